"""Inputs by kind of fault, each with its right value: what is read, or the reason why it is rejected.

`python -m tests.reports.kinds` tries them all and prints a table: kind, tried, right.
"""

import contextlib
import io
import json
import os
import sys
import tempfile
import unicodedata
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, ImageDraw

BOX = (8, 8, 24, 24)
POLYGON = [8, 8, 24, 8, 24, 24, 8, 24]
SIZE = (48, 64)
AREA = 256


class Input(NamedTuple):
    """write: makes the files in a folder and returns the arguments. right: the rows, or a part of the message."""

    kind: str
    name: str
    write: Callable[[Path], list[str]]
    right: Any


def scene(size: tuple[int, int] = SIZE, box: tuple[int, int, int, int] = BOX, seed: int = 0) -> Image.Image:
    """A grey noisy picture with a red block."""
    noise = np.random.default_rng(seed).integers(90, 130, (*size, 3), dtype=np.uint8)
    image = Image.fromarray(noise)
    ImageDraw.Draw(image).rectangle((box[0], box[1], box[2] - 1, box[3] - 1), fill=(220, 30, 30))
    return image


def pictures(folder: Path, names: tuple[str, ...] = ("a.jpg", "b.jpg")) -> None:
    for seed, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        scene(seed=seed).save(folder / name, "JPEG", quality=95)


def mask(size: tuple[int, int] = SIZE, box: tuple[int, int, int, int] = BOX) -> np.ndarray:
    made = np.zeros(size, np.uint8)
    made[box[1] : box[3], box[0] : box[2]] = 1
    return made


def runs(made: np.ndarray) -> list[int]:
    flat = made.T.reshape(-1)
    changes = np.flatnonzero(np.diff(flat)) + 1
    found = np.diff(np.concatenate([[0], changes, [flat.size]])).tolist()
    return ([0] if flat[0] else []) + found


def compressed(made: np.ndarray) -> dict[str, Any]:
    from pycocotools import mask as coco

    found = coco.encode(np.asfortranarray(made))
    return {"size": list(made.shape), "counts": found["counts"].decode()}


def table(name: str, content: str | bytes, *more: str) -> Callable[[Path], list[str]]:
    def write(folder: Path) -> list[str]:
        pictures(folder)
        data = content.encode() if isinstance(content, str) else content
        (folder / name).write_bytes(data)
        return ["--table", str(folder / name), *more]

    return write


def rows(*entries: dict[str, Any]) -> str:
    base = {"image": "a.jpg", "sentence": "the block", "mask": [POLYGON], "split": "train"}
    return "\n".join(json.dumps({**base, **entry}) for entry in entries)


def jsonl(*entries: dict[str, Any]) -> Callable[[Path], list[str]]:
    return table("t.jsonl", rows(*entries))


def parquet(columns: dict[str, Any]) -> Callable[[Path], list[str]]:
    def write(folder: Path) -> list[str]:
        pictures(folder)
        pq.write_table(pa.table(columns), folder / "t.parquet")
        return ["--table", str(folder / "t.parquet")]

    return write


P = f'"[{POLYGON}]"'
T = f"[{POLYGON}]"
ONE = [("the block", AREA, "train")]


def one_line(sentence: str) -> str:
    """A row of JSON Lines whose characters are not escaped."""
    return json.dumps({"image": "a.jpg", "sentence": sentence, "mask": [POLYGON], "split": "train"}, ensure_ascii=False)


def csv_one(sentence: str, header: str = "image,sentence,mask,split") -> str:
    return f"{header}\na.jpg,{sentence},{P},train\n"


QUOTING = [
    Input("rows and quotes", "CSV, plain", table("t.csv", csv_one("the block")), ONE),
    Input(
        "rows and quotes",
        "CSV, doubled quotes",
        table("t.csv", csv_one('"the ""block"""')),
        [('the "block"', AREA, "train")],
    ),
    Input(
        "rows and quotes",
        "CSV, quote in the middle",
        table("t.csv", csv_one('the 21" block')),
        [('the 21" block', AREA, "train")],
    ),
    Input("rows and quotes", "CSV, stray quotes at the start", table("t.csv", csv_one('"stop" sign')), "line 2"),
    Input(
        "rows and quotes",
        "CSV, a quote never closed",
        table("t.csv", f'image,sentence,mask,split\na.jpg,"the block,m.png,train\nb.jpg,the thing,{P},train\n'),
        "line ",
    ),
    Input(
        "rows and quotes",
        "CSV, comma in quotes",
        table("t.csv", csv_one('"the block, red"')),
        [("the block, red", AREA, "train")],
    ),
    Input(
        "rows and quotes",
        "CSV, comma without quotes",
        table("t.csv", csv_one("the block, red")),
        "Expected 4 columns, got 5",
    ),
    Input("rows and quotes", "CSV, line break in quotes", table("t.csv", csv_one('"the\nblock"')), ONE),
    Input("rows and quotes", "CSV, CR LF", table("t.csv", csv_one("the block").replace("\n", "\r\n")), ONE),
    Input("rows and quotes", "CSV, no line feed at the end", table("t.csv", csv_one("the block").strip()), ONE),
    Input(
        "rows and quotes",
        "CSV, semicolons",
        table("t.csv", f"image;sentence;mask;split\na.jpg;the block;{P};train\n"),
        ONE,
    ),
    Input(
        "rows and quotes", "CSV, bars", table("t.csv", f"image|sentence|mask|split\na.jpg|the block|{T}|train\n"), ONE
    ),
    Input(
        "rows and quotes",
        "CSV, tabs",
        table("t.csv", f"image\tsentence\tmask\tsplit\na.jpg\tthe block\t{T}\ttrain\n"),
        ONE,
    ),
    Input(
        "rows and quotes",
        "CSV, spaces after commas",
        table("t.csv", f"image, sentence, mask, split\na.jpg, the block, {P}, train\n"),
        ONE,
    ),
    Input("rows and quotes", "CSV, empty rows", table("t.csv", csv_one("the block") + ",,,\n\n"), ONE),
    Input(
        "rows and quotes",
        "CSV, a column twice",
        table("t.csv", f"image,mask,mask\na.jpg,{P},{P}\n"),
        "has the column 'mask' twice",
    ),
    Input(
        "rows and quotes",
        "TSV, quotes kept",
        table("t.tsv", f'image\tsentence\tmask\tsplit\na.jpg\t"stop" block\t{T}\ttrain\n'),
        [('"stop" block', AREA, "train")],
    ),
    Input(
        "rows and quotes",
        "TSV, one quote",
        table(
            "t.tsv", f'image\tsentence\tmask\tsplit\na.jpg\t"the block\t{T}\ttrain\nb.jpg\tthe 2" block\t{T}\ttrain\n'
        ),
        [('"the block', AREA, "train"), ('the 2" block', AREA, "train")],
    ),
    Input(
        "rows and quotes",
        "TSV of pandas",
        table("t.tsv", f'image\tsentence\tmask\tsplit\na.jpg\t"""stop"" block"\t{T}\ttrain\n'),
        [('"stop" block', AREA, "train")],
    ),
    Input(
        "rows and quotes",
        "TSV, all in quotes",
        table("t.tsv", f'"image"\t"sentence"\t"mask"\t"split"\n"a.jpg"\t"the block"\t"{T}"\t"train"\n'),
        ONE,
    ),
    Input(
        "rows and quotes",
        "TSV, a torn row",
        table("t.tsv", f"image\tsentence\tmask\tsplit\na.jpg\tthe\nblock\t{T}\ttrain\n"),
        "line 2",
    ),
    Input(
        "rows and quotes",
        "JSONL, U+2028",
        table("t.jsonl", one_line("the\u2028block")),
        ONE,
    ),
    Input(
        "rows and quotes",
        "JSONL, U+0085",
        table("t.jsonl", one_line("the\u0085block")),
        ONE,
    ),
    Input("rows and quotes", "JSONL, CR LF and blank lines", table("t.jsonl", rows({}) + "\r\n\r\n"), ONE),
    Input("rows and quotes", "JSONL, a list", table("t.jsonl", "[1]"), "line 1 holds a list"),
    Input(
        "rows and quotes",
        "JSON, a key twice",
        table("t.json", '[{"image": "a.jpg", "sentence": "x", "sentence": "y", "box": [1,2,3,4]}]'),
        "the key 'sentence' is given twice",
    ),
]
CAFE = [("the café", AREA, "train")]
ENCODINGS = [
    *(
        Input("encodings", f"{ending}, {encoding}", table(f"t.{ending}", text.encode(encoding)), CAFE)
        for ending, text in (
            ("csv", csv_one("the café")),
            ("jsonl", one_line("the café")),
        )
        for encoding in ("utf-8", "utf-8-sig", "utf-16", "utf-32")
    ),
    *(
        Input("encodings", f"{ending}, {encoding}, not named", table(f"t.{ending}", text.encode(encoding)), "UTF-8")
        for ending, text in (
            ("csv", csv_one("the café")),
            ("jsonl", one_line("the café")),
        )
        for encoding in ("cp1252", "latin-1", "mac-roman")
    ),
    Input(
        "encodings", "csv, utf-16-le without a mark", table("t.csv", csv_one("the block").encode("utf-16-le")), "UTF-16"
    ),
    Input("encodings", "U+FFFD in a sentence", jsonl({"sentence": "the caf\ufffd"}), "U+FFFD"),
    Input("encodings", "NUL in a sentence", jsonl({"sentence": "the\0block"}), "NUL"),
    Input("encodings", "half of a surrogate pair", jsonl({"sentence": "the \ud83d block"}), "surrogate"),
    Input("encodings", "an emoji", jsonl({"sentence": "the 😀 block"}), [("the 😀 block", AREA, "train")]),
    Input("encodings", "no-break spaces", jsonl({"sentence": "the\u00a0block"}), ONE),
]


def cell(sentences: str = "the block", made: str = P, column: str = "sentence") -> Callable[[Path], list[str]]:
    return table("t.csv", f"image,{column},mask,split\na.jpg,{sentences},{made},train\n")


TWO = [("one", AREA, "train"), ("two", AREA, "train")]
RLE = {"size": list(SIZE), "counts": runs(mask())}
CELLS = [
    Input("cells of pandas", "list of texts, JSON", cell('"[""one"", ""two""]"', column="sentences"), TWO),
    Input("cells of pandas", "list of texts, repr", cell("\"['one', 'two']\"", column="sentences"), TWO),
    Input(
        "cells of pandas",
        "list of texts, an apostrophe",
        cell('"[\'one\', ""the dog\'s""]"', column="sentences"),
        [("one", AREA, "train"), ("the dog's", AREA, "train")],
    ),
    Input("cells of pandas", "numpy array of texts", cell("\"['one' 'two']\"", column="sentences"), "not JSON"),
    Input("cells of pandas", "a sentence in brackets", cell("[the block]"), [("[the block]", AREA, "train")]),
    Input(
        "cells of pandas",
        "a sentence that starts with a bracket",
        cell("[1] the block"),
        [("[1] the block", AREA, "train")],
    ),
    Input(
        "cells of pandas", "a cut list", cell("\"['one', 'tw\"", column="sentences"), [("['one', 'tw", AREA, "train")]
    ),
    Input("cells of pandas", "run lengths, repr", cell(made=f'"{RLE}"'), ONE),
    Input(
        "cells of pandas",
        "run lengths with bytes, repr",
        cell(
            made='"'
            + str({"size": list(SIZE), "counts": compressed(mask())["counts"].encode()}).replace('"', '""')
            + '"'
        ),
        ONE,
    ),
    Input("cells of pandas", "polygons as tuples, repr", cell(made=f'"[{tuple(POLYGON)}]"'), ONE),
    Input("cells of pandas", "numpy array of numbers", cell(made='"[[ 8  8 24  8 24 24  8 24]]"'), "not JSON"),
    Input("cells of pandas", "array(...) repr", cell(made='"[array([8, 8, 24])]"'), "not JSON"),
    Input("cells of pandas", "a long array cut by ...", cell(made='"[[8 8 ... 8 24]]"'), "not JSON"),
    Input(
        "cells of pandas",
        "ref_id 3.0",
        table("t.csv", f"image,sentence,mask,split,ref_id\na.jpg,the block,{P},train,3.0\nb.jpg,x,{P},train,\n"),
        [("the block", AREA, "train"), ("x", AREA, "train")],
    ),
    *(
        Input(
            "cells of pandas",
            f"no_target {value!r}",
            table("t.csv", f"image,sentence,mask,split,no_target\na.jpg,the block,{P},train,{value}\n"),
            ONE,
        )
        for value in ("0.0", "False", "0", "no", "nan", "", "FALSE")
    ),
    *(
        Input(
            "cells of pandas",
            f"empty mask {value!r}",
            table("t.csv", f"image,sentence,mask,split,no_target\na.jpg,the block,{value},train,1.0\n"),
            [("the block", 0, "train")],
        )
        for value in ("nan", "NaN", "", "None", "null", "[]")
    ),
    Input(
        "cells of pandas",
        "Parquet, float ids and flags",
        parquet(
            {
                "image": ["a.jpg", "b.jpg"],
                "sentence": ["the block", "x"],
                "mask": [[[float(c) for c in POLYGON]], None],
                "ref_id": [3.0, float("nan")],
                "no_target": [0.0, 1.0],
                "split": ["train"] * 2,
            }
        ),
        [("the block", AREA, "train"), ("x", 0, "train")],
    ),
    Input(
        "cells of pandas",
        "ref_id 3.5",
        table("t.csv", f"image,sentence,mask,split,ref_id\na.jpg,the block,{P},train,3.5\n"),
        "ref_id is '3.5', not a whole number",
    ),
    Input(
        "cells of pandas",
        "ref_id as a text",
        table("t.csv", f"image,sentence,mask,split,ref_id\na.jpg,the block,{P},train,obj-7\n"),
        ONE,
    ),
    Input("cells of pandas", "a sentence that is `none`", cell("none"), [("none", AREA, "train")]),
    Input(
        "cells of pandas", "columns in capitals", table("t.csv", csv_one("the block", "Image,Sentence,MASK,Split")), ONE
    ),
    Input(
        "cells of pandas",
        "an index column",
        table("t.csv", f",image,sentence,mask,split\n0,a.jpg,the block,{P},train\n"),
        ONE,
    ),
]


def bitmap(values: Any) -> Callable[[Path], list[str]]:
    return jsonl({"mask": values})


def mask_file(make: Callable[[], Image.Image], name: str = "m.png", **row: Any) -> Callable[[Path], list[str]]:
    def write(folder: Path) -> list[str]:
        pictures(folder)
        make().save(folder / name)
        (folder / "t.jsonl").write_text(rows({"mask": name, **row}))
        return ["--table", str(folder / "t.jsonl")]

    return write


def palette() -> Image.Image:
    image = Image.fromarray(mask(), "P")
    image.putpalette([0, 0, 0, 128, 0, 0] + [0] * 762)
    return image


def png_text() -> str:
    import base64

    written = io.BytesIO()
    Image.fromarray(mask() * np.uint8(255)).save(written, "PNG")
    return base64.b64encode(written.getvalue()).decode()


M = mask()
ALPHA = np.dstack([np.zeros((*SIZE, 3), np.uint8), M * np.uint8(255)])
TWO_COLOURS = np.zeros((*SIZE, 3), np.uint8)
TWO_COLOURS[8:24, 8:24], TWO_COLOURS[30:40, 30:40] = (255, 0, 0), (0, 255, 0)
POINTS = [POLYGON[i : i + 2] for i in range(0, 8, 2)]
FORMS = [
    Input("forms of masks", "polygons", bitmap([POLYGON]), ONE),
    Input("forms of masks", "one polygon", bitmap(POLYGON), ONE),
    Input("forms of masks", "points", bitmap(POINTS), ONE),
    Input("forms of masks", "polygons of points", bitmap([POINTS]), ONE),
    Input(
        "forms of masks",
        "two polygons of points",
        bitmap([POINTS, [[30, 30], [40, 30], [40, 40], [30, 40]]]),
        [("the block", AREA + 100, "train")],
    ),
    Input("forms of masks", "points as objects", bitmap([{"x": x, "y": y} for x, y in POINTS]), ONE),
    Input(
        "forms of masks",
        "polygons by instance",
        bitmap([[POLYGON], [[30, 30, 40, 30, 40, 40, 30, 40]]]),
        [("the block", AREA + 100, "train")],
    ),
    Input("forms of masks", "box", bitmap([8, 8, 16, 16]), ONE),
    Input("forms of masks", "four numbers as a polygon", bitmap([[8, 8, 24, 24]]), "four numbers"),
    Input("forms of masks", "four numbers beside a polygon", bitmap([POLYGON, [30, 30, 40, 40]]), ONE),
    Input("forms of masks", "coordinates as texts", bitmap([[str(c) for c in POLYGON]]), "texts"),
    Input("forms of masks", "odd coordinates", bitmap([POLYGON[:7]]), "odd number"),
    Input("forms of masks", "run lengths, list", bitmap(RLE), ONE),
    Input("forms of masks", "run lengths, text", bitmap(compressed(M)), ONE),
    Input(
        "forms of masks",
        "run lengths, floats",
        bitmap({"size": [48.0, 64.0], "counts": [float(r) for r in runs(M)]}),
        ONE,
    ),
    Input(
        "forms of masks", "run lengths, height and width", bitmap({"height": 48, "width": 64, "counts": runs(M)}), ONE
    ),
    Input(
        "forms of masks",
        "a list of run lengths",
        bitmap([RLE, compressed(mask(box=(30, 30, 40, 40)))]),
        [("the block", AREA + 100, "train")],
    ),
    Input("forms of masks", "run lengths of [width, height]", bitmap({"size": [64, 48], "counts": runs(M)}), "size"),
    Input("forms of masks", "pairs of start and length", bitmap("393 16 441 16"), "pairs (start, length)"),
    Input("forms of masks", "bitmap of 0 and 1", bitmap(M.tolist()), ONE),
    Input("forms of masks", "bitmap of 0 and 255", bitmap((M * 255).tolist()), ONE),
    Input("forms of masks", "bitmap of truth values", bitmap(M.astype(bool).tolist()), ONE),
    Input("forms of masks", "bitmap with a channel", bitmap(M[..., None].tolist()), ONE),
    Input("forms of masks", "bitmap in a list", bitmap([M.tolist()]), ONE),
    Input("forms of masks", "bitmap of another size", bitmap(M[:40].tolist()), "looks like a bitmap of 40 x 64"),
    Input("forms of masks", "PNG in base64", bitmap(png_text()), ONE),
    Input("forms of masks", "PNG as a data address", bitmap(f"data:image/png;base64,{png_text()}"), ONE),
    Input("forms of masks", "GeoJSON", bitmap({"type": "Polygon", "coordinates": [POINTS]}), "GeoJSON"),
    Input("forms of masks", "WKT", bitmap("POLYGON ((8 8, 24 8, 24 24))"), "WKT"),
    Input("forms of masks", "PNG, 255", mask_file(lambda: Image.fromarray(M * np.uint8(255))), ONE),
    Input("forms of masks", "PNG, 1 bit", mask_file(lambda: Image.fromarray(M.astype(bool))), ONE),
    Input("forms of masks", "PNG, palette", mask_file(palette), ONE),
    Input(
        "forms of masks",
        "PNG, three channels",
        mask_file(lambda: Image.fromarray(np.dstack([M * np.uint8(255)] * 3))),
        ONE,
    ),
    Input("forms of masks", "PNG, 16 bits", mask_file(lambda: Image.fromarray(M.astype(np.uint16) * 40_000)), ONE),
    Input("forms of masks", "PNG, object in the alpha channel", mask_file(lambda: Image.fromarray(ALPHA)), ONE),
    Input("forms of masks", "PNG, two colours", mask_file(lambda: Image.fromarray(TWO_COLOURS)), "beside 0"),
    Input(
        "forms of masks",
        "PNG, one of two colours",
        mask_file(lambda: Image.fromarray(TWO_COLOURS), mask_value=255 << 16),
        ONE,
    ),
    Input("forms of masks", "mask ending in capitals", mask_file(lambda: Image.fromarray(M), "m.PNG"), ONE),
]


def turned(turn: int, stated: str, size: tuple[int, int] = SIZE, *more: str) -> Callable[[Path], list[str]]:
    """A picture whose upright form has the red block at BOX, stored with an EXIF orientation. stated: the size in the
    COCO JSON: upright, stored, half, none."""

    def write(folder: Path) -> list[str]:
        upright = scene(size)
        back = {1: None, 2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}[turn]
        stored = upright if back is None else upright.transpose(Image.Transpose(back))
        exif = Image.Exif()
        exif[0x0112] = turn
        stored.save(folder / "a.jpg", quality=98, exif=exif.tobytes())
        height, width = {"upright": size, "stored": stored.size[::-1], "double": (2 * size[0], 2 * size[1])}.get(
            stated, (0, 0)
        )
        image = {"id": 1, "file_name": "a.jpg"} | ({"height": height, "width": width} if height else {})
        factor = 2 if stated == "double" else 1
        entry = {
            "id": 1,
            "image_id": 1,
            "segmentation": [[c * factor for c in POLYGON]],
            "sentence": "the block",
            "split": "train",
        }
        (folder / "t.json").write_text(json.dumps({"images": [image], "annotations": [entry]}))
        return ["--table", str(folder / "t.json"), *more]

    return write


RED = [("the block", AREA, "train", "red")]
FRAMES = [
    *(Input("frames", f"EXIF {turn}, stated upright", turned(turn, "upright"), RED) for turn in (1, 5, 6, 7, 8)),
    *(Input("frames", f"EXIF {turn}, nothing stated", turned(turn, "none"), "--exif") for turn in (2, 3, 6, 8)),
    *(Input("frames", f"EXIF {turn}, stated size fits both", turned(turn, "upright"), "--exif") for turn in (2, 3, 4)),
    *(
        Input("frames", f"EXIF {turn}, --exif upright", turned(turn, "none", SIZE, "--exif", "upright"), RED)
        for turn in (2, 3, 4, 6, 8)
    ),
    Input("frames", "a square picture, EXIF 6", turned(6, "upright", (64, 64)), "--exif"),
    Input("frames", "a square picture, --exif upright", turned(6, "upright", (64, 64), "--exif", "upright"), RED),
    Input("frames", "annotated at double size", turned(1, "double"), RED),
    Input("frames", "annotated at double size, EXIF 6", turned(6, "double"), RED),
    Input(
        "frames",
        "height and width exchanged",
        table(
            "t.json",
            json.dumps(
                {
                    "images": [{"id": 1, "file_name": "a.jpg", "height": 64, "width": 48}],
                    "annotations": [{"id": 1, "image_id": 1, "segmentation": [POLYGON], "sentence": "x"}],
                }
            ),
        ),
        "exchanged",
    ),
    Input(
        "frames",
        "another picture's size",
        table(
            "t.json",
            json.dumps(
                {
                    "images": [{"id": 1, "file_name": "a.jpg", "height": 48, "width": 99}],
                    "annotations": [{"id": 1, "image_id": 1, "segmentation": [POLYGON], "sentence": "x"}],
                }
            ),
        ),
        "annotations say 48 x 99",
    ),
    Input(
        "frames",
        "CSV with height and width",
        table("t.csv", f"image,sentence,mask,split,height,width\na.jpg,the block,{P},train,48,99\n"),
        "annotations say 48 x 99",
    ),
    Input("frames", "a mask file at half size", mask_file(lambda: Image.fromarray(M[::2, ::2])), ONE),
    Input("frames", "a mask file of other proportions", mask_file(lambda: Image.fromarray(M[:40])), "[40, 64]"),
]


def named(stored: str, given: str, *more: str) -> Callable[[Path], list[str]]:
    def write(folder: Path) -> list[str]:
        pictures(folder, (stored,))
        (folder / "t.jsonl").write_text(rows({"image": given.replace("FOLDER", str(folder))}))
        return ["--table", str(folder / "t.jsonl"), *more]

    return write


def linked(folder: Path, *more: str) -> list[str]:
    pictures(folder, ("store/x",))
    (folder / "data").mkdir()
    os.symlink("../store/x", folder / "data/a.jpg")
    (folder / "data/t.jsonl").write_text(rows({}))
    return ["--table", str(folder / "data/t.jsonl"), *more]


def same_picture(one: str, other: str, link: bool = False, copy: bool = False) -> Callable[[Path], list[str]]:
    """Two names of one picture in train and val: one image, and a note of the leak."""

    def write(folder: Path) -> list[str]:
        pictures(folder, ("a.jpg",))
        if link:
            os.symlink("a.jpg", folder / other)
        if copy:
            (folder / other).write_bytes((folder / "a.jpg").read_bytes())
        elsewhere = [[c + 10 for c in POLYGON]]
        (folder / "t.jsonl").write_text(rows({"image": one}, {"image": other, "split": "val", "mask": elsewhere}))
        return ["--table", str(folder / "t.jsonl")]

    return write


LEAK = "note: 1 images are in more than one split"
NAMES = [
    Input("names and identity", "back slashes", named("sub/a.jpg", "sub\\a.jpg"), ONE),
    Input("names and identity", "./", named("a.jpg", "./a.jpg"), ONE),
    Input("names and identity", "doubled slash", named("sub/a.jpg", "sub//a.jpg"), ONE),
    Input("names and identity", "absolute", named("a.jpg", "FOLDER/a.jpg"), ONE),
    Input("names and identity", "ending in capitals", named("a.JPG", "a.jpg"), ONE),
    Input("names and identity", "name in capitals", named("a.jpg", "A.JPG"), ONE),
    Input(
        "names and identity",
        "decomposed letters in the table",
        named("café.jpg", unicodedata.normalize("NFD", "café.jpg")),
        ONE,
    ),
    Input(
        "names and identity",
        "decomposed letters on the disk",
        named(unicodedata.normalize("NFD", "café.jpg"), "café.jpg"),
        ONE,
    ),
    Input("names and identity", "white space around", named("a.jpg", " a.jpg "), ONE),
    Input("names and identity", "file://", named("a.jpg", "file://FOLDER/a.jpg"), ONE),
    Input("names and identity", "a file that is missing", named("a.jpg", "c.jpg"), "no image such as c.jpg"),
    Input("names and identity", "..", named("a.jpg", "../a.jpg"), "no image"),
    Input("names and identity", "a link that leaves the folder", linked, "--follow_links"),
    Input("names and identity", "a link, --follow_links", lambda folder: linked(folder, "--follow_links"), ONE),
    Input("names and identity", "leak by ./", same_picture("a.jpg", "./a.jpg"), LEAK),
    Input("names and identity", "leak by a back slash", same_picture("a.jpg", ".\\a.jpg"), LEAK),
    Input("names and identity", "leak by a link", same_picture("a.jpg", "b.jpg", link=True), LEAK),
    Input("names and identity", "leak by a copy", same_picture("a.jpg", "b.jpg", copy=True), LEAK),
    Input("names and identity", "leak by capitals", same_picture("a.jpg", "A.jpg"), LEAK),
]


def coco(annotations: list[dict[str, Any]], images: list[dict[str, Any]] | None = None) -> Callable[[Path], list[str]]:
    images = images or [{"id": 1, "file_name": "a.jpg", "height": 48, "width": 64}]
    base = {"id": 1, "image_id": 1, "segmentation": [POLYGON], "sentence": "the block", "split": "train"}
    return table("t.json", json.dumps({"images": images, "annotations": [{**base, **entry} for entry in annotations]}))


SPLITS_AND_IDS = [
    *(
        Input("splits and ids", f"split {given!r}", jsonl({"split": given}), [("the block", AREA, right)])
        for given, right in (
            ("Train", "train"),
            ("TRAIN", "train"),
            ("valid", "val"),
            ("Validation", "val"),
            ("testing", "test"),
            ("testA", "testA"),
            ("dev", "dev"),
        )
    ),
    Input(
        "splits and ids",
        "valid and val together",
        jsonl({"split": "valid"}, {"image": "b.jpg", "split": "val", "sentence": "x"}),
        [("the block", AREA, "val"), ("x", AREA, "val")],
    ),
    Input(
        "splits and ids",
        "Train and train of one ref",
        jsonl({"split": "Train", "ref_id": 1}, {"split": "train", "ref_id": 1, "sentence": "x"}),
        [("the block", AREA, "train"), ("x", AREA, "train")],
    ),
    Input("splits and ids", "COCO, image ids as texts", coco([{"image_id": "1"}]), ONE),
    Input("splits and ids", "COCO, image ids as floats", coco([{"image_id": 1.0}]), ONE),
    Input(
        "splits and ids",
        "COCO, one id of two pictures",
        coco([{}], [{"id": 1, "file_name": "a.jpg"}, {"id": 1, "file_name": "b.jpg"}]),
        "image id 1 is of 'a.jpg' and of 'b.jpg'",
    ),
    Input("splits and ids", "COCO, an annotation without a sentence", coco([{}, {"id": 2, "sentence": None}]), ONE),
    Input(
        "splits and ids",
        "COCO, a bad annotation that is not used",
        coco([{}, {"id": 2, "sentence": None, "segmentation": "x", "image_id": 99}]),
        ONE,
    ),
    Input(
        "splits and ids", "COCO, a box and no segmentation", coco([{"segmentation": [], "bbox": [8, 8, 16, 16]}]), ONE
    ),
    Input("splits and ids", "COCO, no sentence at all", coco([{"sentence": None}]), "no sentence"),
]
INPUTS = [*QUOTING, *ENCODINGS, *CELLS, *FORMS, *FRAMES, *NAMES, *SPLITS_AND_IDS]


def outcome(given: Input, folder: Path) -> tuple[list[tuple[Any, ...]] | None, str]:
    """The prepared rows (sentence, area, split), None where it was rejected, and what was said."""
    from amltrain.commands.prepare import main

    said = io.StringIO()
    try:
        arguments = given.write(folder)
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            main([*arguments, "--name", "mine", "--output", str(folder / "prepared"), "--workers", "1"])
    except SystemExit:
        return None, said.getvalue()
    except Exception as error:  # a fault of ours, which is never right
        return None, f"CRASH {type(error).__name__}: {error}"
    return _prepared(folder / "prepared/mine"), said.getvalue()


def _prepared(folder: Path) -> list[tuple[Any, ...]]:
    from amltrain.data.images import decode_image
    from amltrain.data.segmentation import decode_mask

    found = []
    for path in sorted(folder.glob("*.parquet")):
        for row in pq.read_table(path).to_pylist():
            pixels = np.asarray(decode_image(row["image"]["bytes"], "x", (row["height"], row["width"])))
            for referent in row["referents"]:
                made = decode_mask(referent["mask"])
                red = bool(made.any()) and float(pixels[made > 0][:, 0].mean()) > 190
                for sentence in referent["sentences"]:
                    split = path.name.partition("-")[0]
                    found.append((sentence["raw"], int(made.sum()), split, "red" if red else "elsewhere"))
    return found


def is_right(given: Input, found: list[tuple[Any, ...]] | None, said: str) -> bool:
    """Whether an outcome is the right one: the rows, or a message that has the reason, and never a crash."""
    if "CRASH" in said or "Traceback" in said:
        return False
    if isinstance(given.right, str):
        return given.right in said and (found is None or given.right.startswith("note:"))
    return found is not None and sorted(row[: len(given.right[0])] for row in found) == sorted(given.right)


def main_table() -> None:
    """Try every input, and print the table and what is wrong."""
    tried, right, silent = Counter[str](), Counter[str](), Counter[str]()
    for given in INPUTS:
        with tempfile.TemporaryDirectory() as folder:
            found, said = outcome(given, Path(folder))
        fits = is_right(given, found, said)
        tried[given.kind] += 1
        right[given.kind] += fits
        silent[given.kind] += not fits and found is not None
        if not fits:
            print(f"wrong: {given.kind}: {given.name}: {found} {said.strip()[-160:]!r}", file=sys.stderr)
    for kind, count in tried.items():
        print(f"| {kind} | {count} | {right[kind]} | {silent[kind]} |")
    print(f"| all | {tried.total()} | {right.total()} | {silent.total()} |")


if __name__ == "__main__":
    main_table()
