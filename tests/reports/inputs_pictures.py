"""Inputs whose fault lies in masks and pictures: forms, frames, names, splits and ids."""

import base64
import io
import json
import os
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tests.reports.making import (
    AREA,
    ONE,
    POLYGON,
    SIZE,
    Input,
    P,
    compressed,
    jsonl,
    mask,
    pictures,
    rows,
    runs,
    scene,
    table,
)


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

    written = io.BytesIO()
    Image.fromarray(mask() * np.uint8(255)).save(written, "PNG")
    return base64.b64encode(written.getvalue()).decode()


M = mask()
RLE = {"size": list(SIZE), "counts": runs(M)}
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
