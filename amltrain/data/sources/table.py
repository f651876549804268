"""Your own data: a table (JSONL, CSV, Parquet), a COCO-style JSON, or a folder of image, mask and text files.

    image      path below the image folder
    sentence   a text; or `sentences`: several
    mask       a PNG file, COCO run lengths, polygons, or a box; empty where `no_target` is true
    split, ref_id, category, image_id, mask_value, no_target   optional

Cells of a CSV file may hold JSON. docs/data.md shows each form.
"""

import codecs
import json
import os
import reprlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from amltrain.data.sources.annotations import Annotations, MaskFile
from amltrain.data.sources.own import SHARES, TableRow, build_annotations, check_name
from amltrain.errors import UserError, first_line
from amltrain.files import load_json, read_bytes, sha256

COLUMNS: dict[str, tuple[str, ...]] = {
    "image": ("image", "file_name", "image_path"),
    "sentence": ("sentence", "sentences", "text", "texts", "caption", "expression"),
    "mask": ("mask", "segmentation", "mask_path", "rle", "polygon", "polygons"),
    "box": ("box", "bbox"),
    "no_target": ("no_target",),
    "split": ("split",),
    "ref_id": ("ref_id",),
    "category": ("category", "label"),
    "image_id": ("image_id",),
    "mask_value": ("mask_value",),
}
"""The names under which a column is found, first match first."""
IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
_CSV_FIXES = {
    "invalid UTF8": "save it as UTF-8",
    "Expected": "put cells that hold commas in double quotes",
}
"""What to do about the messages of the CSV reader."""
_YES, _NO = {"1", "true", "yes"}, {"0", "false", "no", ""}


def read_table(
    table: Path,
    images: Path,
    name: str,
    *,
    masks: Path | None = None,
    columns: Mapping[str, str] | None = None,
    mask_threshold: int | None = None,
    seed: int = 0,
    shares: Mapping[str, float] = SHARES,
) -> Annotations:
    """Read a table or a COCO-style JSON.

    images, masks: folders that paths are relative to; masks: default `images`, then the table's own folder. columns:
    {"image": "photo"} renames. mask_threshold: mask pixels of at least this value are the object. seed, shares: how
    images are assigned to splits where the table has none. Raises UserError naming the file and the row.
    """
    check_name(name)
    rows = list(read_rows(table))
    if not rows:
        raise UserError(f"{table} has no rows")
    names = _find_columns(list(dict.fromkeys(key for row in rows for key in row)), columns or {}, str(table))
    folders = [folder for folder in (masks, images, table.parent) if folder is not None]
    parsed = [
        _parse(row, names, f"row {number}", str(table), images, folders, mask_threshold)
        for number, row in enumerate(rows, 1)
    ]
    boxes = sum(bool(box) for _, box in parsed)
    notes = (f"{boxes:,} masks are boxes",) if boxes else ()
    return build_annotations(
        [row for row, _ in parsed],
        name,
        sources={table.name: sha256(table)},
        place=str(table),
        seed=seed,
        shares=shares,
        notes=notes,
    )


def read_rows(table: Path) -> Iterator[dict[str, Any]]:
    """The rows of a .jsonl, .json (a list, or COCO-style), .csv, .tsv or .parquet file. Raises UserError."""
    if table.exists() and not table.is_file():
        raise UserError(f"could not read {table} (not a regular file); for a folder of files give --folder")
    if not table.is_file():
        raise UserError(f"there is no table {table}")
    kind = table.suffix.lower()
    if kind == ".jsonl":
        yield from _json_lines(table)
    elif kind == ".json":
        content = load_json(table)
        yield from _coco_rows(content, table) if isinstance(content, dict) else _list_rows(content, table)
    elif kind in (".csv", ".tsv", ".parquet"):
        try:
            read = _read_parquet if kind == ".parquet" else _read_csv
            yield from read(table).to_pylist()
        except (pa.ArrowException, OSError, ValueError, OverflowError) as error:
            why = first_line(error)
            hint = next((f"; {fix}" for sign, fix in _CSV_FIXES.items() if kind == ".csv" and sign in why), "")
            raise UserError(f"{table} cannot be read as {kind[1:]} ({why}){hint}") from error
    else:
        raise UserError(f"{table}: the table should be .jsonl, .json, .csv, .tsv or .parquet")


def _json_lines(table: Path) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(read_bytes(table).decode("utf-8-sig", errors="replace").splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{table}, line {number} is not JSON ({first_line(error)})") from error
        if not isinstance(row, dict):
            raise UserError(f"{table}, line {number} holds a {type(row).__name__}, not an object")
        yield row


def _list_rows(content: Any, table: Path) -> Iterator[dict[str, Any]]:
    if not isinstance(content, list) or not all(isinstance(row, dict) for row in content):
        raise UserError(f"{table} should hold a list of objects, or be COCO-style (images, annotations)")
    yield from content


def _read_csv(table: Path) -> pa.Table:
    """Read all columns as text, so that `007` stays a name."""
    with table.open("rb") as file:
        if file.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
            raise ValueError("it is UTF-16; save it as UTF-8")
    parse = pyarrow.csv.ParseOptions(delimiter="\t" if table.suffix == ".tsv" else ",", newlines_in_values=True)
    with pyarrow.csv.open_csv(table, parse_options=parse) as reader:
        names = reader.schema.names
    types = pyarrow.csv.ConvertOptions(column_types=dict.fromkeys(names, pa.string()), strings_can_be_null=False)
    return pyarrow.csv.read_csv(table, parse_options=parse, convert_options=types)


def _read_parquet(table: Path) -> pa.Table:
    return pq.read_table(table, page_checksum_verification=True)


def _coco_rows(content: dict[str, Any], table: Path) -> Iterator[dict[str, Any]]:
    """COCO-style: annotations with `sentence` or `sentences` (or `caption`), a segmentation and an image."""
    for key in ("images", "annotations"):
        if not isinstance(content.get(key), list) or not all(isinstance(entry, dict) for entry in content[key]):
            raise UserError(f"{table} has no list {key!r} of objects (it has {', '.join(content) or 'nothing'})")
    images = {image.get("id"): image for image in content["images"]}
    categories = {c.get("id"): c.get("name") for c in content.get("categories") or [] if isinstance(c, dict)}
    for number, annotation in enumerate(content["annotations"], 1):
        image = images.get(annotation.get("image_id"))
        if image is None or "file_name" not in image:
            raise UserError(f"{table}, annotation {number}: image {annotation.get('image_id')!r} is not listed")
        row = {key: annotation[key] for names in COLUMNS.values() for key in names if key in annotation}
        row.pop("bbox", None)  # of the segmentation, not instead of it
        row |= {"image": image["file_name"], "split": annotation.get("split", image.get("split"))}
        if isinstance(image.get("id"), int):
            row["image_id"] = image["id"]
        if annotation.get("category_id") in categories:
            row["category"] = categories[annotation["category_id"]]
        yield row


def _find_columns(there: Sequence[str], renamed: Mapping[str, str], place: str) -> dict[str, tuple[str, ...]]:
    """Under which names each of COLUMNS is found. Raises UserError naming the columns that the table has."""
    has = ", ".join(there) or "none"
    unknown = [key for key in renamed if key not in COLUMNS]
    if unknown:
        raise UserError(f"--columns {unknown[0]}: the columns are {', '.join(COLUMNS)}")
    found = {}
    for column, names in COLUMNS.items():
        wanted = (renamed[column],) if column in renamed else names
        matches = tuple(name for name in wanted if name in there)
        if not matches and column in renamed:
            raise UserError(f"{place} has no column {renamed[column]!r}; it has {has}")
        if matches:
            found[column] = matches
    for column in ("image", "sentence"):
        if column not in found and len(there) == 1 and ";" in has:
            raise UserError(f"{place} has the one column {has!r}; separate the columns by commas")
        if column not in found:
            raise UserError(f"{place} has no column {column!r}; it has {has} (rename with --columns {column}=NAME)")
    if not found.keys() & {"mask", "box", "no_target"}:
        raise UserError(f"{place} has no column 'mask' or 'box'; it has {has} (rename with --columns mask=NAME)")
    return found


def _parse(
    row: dict[str, Any],
    names: dict[str, tuple[str, ...]],
    place: str,
    table: str,
    images: Path,
    folders: Sequence[Path],
    threshold: int | None,
) -> tuple[TableRow, bool]:
    """Parse one row; return it and whether its mask is a box. Raises UserError naming the row."""
    where = f"{table}, {place}"
    cell = {
        column: next((row[name] for name in found if not _empty(row.get(name))), None)
        for column, found in names.items()
    }
    image = cell["image"]
    if not isinstance(image, str) or not image:
        raise UserError(f"{where}: the image is {reprlib.repr(image)}, not a path")
    value = _number(cell.get("mask_value"), "mask_value", where)
    box = _numbers(_json(cell.get("box")))
    mask = _json(cell.get("mask"))
    no_target = _truth(cell.get("no_target"), where)
    segmentation = None if _empty(mask) else _segmentation(mask, folders, value, threshold, where)
    is_box = len(_numbers(mask)) == 4
    box = _numbers(mask) if is_box else box
    if segmentation is None and len(box) == 4:
        segmentation, is_box = box_polygon(box), True
    if is_box and min(box[2:]) <= 0:
        raise UserError(f"{where}: the box {box} has no width or no height; a box is x, y, width, height")
    if no_target and segmentation is not None:
        raise UserError(f"{where}: no_target is true, but there is a mask; leave one of them out")
    if segmentation is None and not no_target:
        raise UserError(f"{where}: the mask is empty; where the sentence refers to nothing, set no_target to true")
    parsed = TableRow(
        place=place,
        image=_relative(image, images),
        sentences=_texts(_json(cell["sentence"]), where),
        segmentation=segmentation,
        split=str(cell["split"]) if cell.get("split") not in (None, "") else None,
        ref_id=_number(cell.get("ref_id"), "ref_id", where),
        image_id=_number(cell.get("image_id"), "image_id", where),
        category=str(cell.get("category") or ""),
        box=tuple(box) if len(box) == 4 else (),
    )
    return parsed, is_box


def _relative(name: str, folder: Path) -> str:
    """A path inside the folder as relative to it; any other path as it is, to be refused when it is opened."""
    path = Path(name)
    if path.is_absolute() and path.is_relative_to(folder.absolute()):
        return str(path.relative_to(folder.absolute()))
    return name


def _segmentation(mask: Any, folders: Sequence[Path], value: int | None, threshold: int | None, where: str) -> Any:
    """A mask cell as polygons, an RLE or a MaskFile. Its values are checked where it is decoded."""
    if isinstance(mask, str):
        found = (folder for folder in folders if os.path.isfile(folder / _relative(mask, folder)))
        folder = next(found, folders[0])
        return MaskFile(folder.resolve(), _relative(mask, folder), value, threshold)
    if isinstance(mask, dict):
        return mask
    flat = _numbers(mask)
    if flat:
        return box_polygon(flat) if len(flat) == 4 else [flat]
    if isinstance(mask, list) and all(len(_numbers(point)) == 2 for point in mask):
        return [[number for point in mask for number in point]]  # one polygon of [x, y] points
    if isinstance(mask, list):
        return mask
    raise UserError(f"{where}: the mask is a {type(mask).__name__}; give a file, run lengths, polygons or a box")


def box_polygon(box: Sequence[float]) -> list[list[float]]:
    """A box (x, y, width, height) as a polygon."""
    x, y, width, height = box
    return [[x, y, x + width, y, x + width, y + height, x, y + height]]


def _json(cell: Any) -> Any:
    """A cell of text that looks like JSON is read as JSON."""
    if isinstance(cell, str) and cell.lstrip()[:1] in ("[", "{"):
        try:
            return json.loads(cell)
        except (ValueError, RecursionError):
            return cell
    return cell


def _empty(cell: Any) -> bool:
    return cell is None or cell == "" or cell == []


def _numbers(cell: Any) -> list[float]:
    """A flat list of numbers, or nothing."""
    if isinstance(cell, (list, tuple)) and all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in cell):
        return list(cell)
    return []


def _number(cell: Any, column: str, where: str) -> int | None:
    if cell is None or cell == "":
        return None
    try:
        if isinstance(cell, bool) or (isinstance(cell, float) and not cell.is_integer()):
            raise ValueError
        number = int(cell)
    except (ValueError, TypeError, OverflowError):
        raise UserError(f"{where}: {column} is {str(cell)[:50]!r}, not a whole number") from None
    if not -(2**63) <= number < 2**63:
        raise UserError(f"{where}: {column} needs more than 64 bits")
    return number


def _truth(cell: Any, where: str) -> bool:
    text = "" if cell is None else str(cell).strip().lower()
    if text not in _YES | _NO:
        raise UserError(f"{where}: no_target is {str(cell)[:50]!r}, not true or false")
    return text in _YES


def _texts(cell: Any, where: str) -> tuple[str, ...]:
    cell = "" if cell is None else cell  # counted as empty where sentences are read
    texts = cell if isinstance(cell, list) else [cell]
    texts = [entry.get("raw", entry.get("sent")) if isinstance(entry, dict) else entry for entry in texts]
    if not all(isinstance(text, str) for text in texts) or not texts:
        raise UserError(f"{where}: the sentence is {str(cell)[:50]!r}, not a text or a list of texts")
    return tuple(" ".join(text.split()) for text in texts)


def read_folder(
    folder: Path,
    name: str,
    *,
    mask_threshold: int | None = None,
    seed: int = 0,
    shares: Mapping[str, float] = SHARES,
) -> Annotations:
    """Read a folder of files: for every `X.txt` (a sentence a line) an image `X.jpg` and a mask `X_mask.png`.

    They may lie side by side, or in `images/`, `masks/X.png` and `texts/`; all of it may lie in folders named after the
    splits. Raises UserError naming the file that is missing.
    """
    check_name(name)
    texts = sorted(path for path in folder.rglob("*.txt") if path.is_file())
    if not texts:
        raise UserError(f"{folder} has no .txt file; put the sentences of X.jpg in X.txt, one a line")
    splits = {path.name for path in folder.iterdir() if path.is_dir()} - {"images", "masks", "texts"}
    rows = [_folder_row(path, folder, splits, mask_threshold) for path in texts]
    listed = json.dumps([[row.image, row.sentences, str(row.segmentation.name)] for row in rows])
    return build_annotations(
        rows,
        name,
        sources={folder.name: _sha256_text(listed)},
        place=str(folder),
        seed=seed,
        shares=shares,
    )


def _folder_row(text: Path, folder: Path, splits: Iterable[str], threshold: int | None) -> TableRow:
    sentences = [line.strip() for line in read_bytes(text).decode("utf-8-sig", errors="replace").splitlines()]
    beside = text.parent.name != "texts"
    base = text.parent if beside else text.parent.parent
    images = [(base if beside else base / "images") / f"{text.stem}{ending}" for ending in IMAGE_ENDINGS]
    masks = [base / f"{text.stem}{end}" for end in ("_mask.png", ".mask.png")] + [base / "masks" / f"{text.stem}.png"]
    image = next((path for path in images if path.is_file()), None)
    mask = next((path for path in masks if path.is_file()), None)
    if image is None or mask is None:
        wanted = "image" if image is None else "mask"
        raise UserError(f"{text} has no {wanted}; expected {(images if image is None else masks)[0]}")
    relative = str(image.relative_to(folder))
    first = relative.split("/")[0]
    return TableRow(
        place=str(text.relative_to(folder)),
        image=relative,
        sentences=tuple(sentence for sentence in sentences if sentence),
        segmentation=MaskFile(folder.resolve(), str(mask.relative_to(folder)), None, threshold),
        split=first if first in splits else None,
    )


def _sha256_text(text: str) -> str:
    import hashlib

    return hashlib.sha256(text.encode()).hexdigest()
