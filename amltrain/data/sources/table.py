"""Your own data: a table (JSONL, CSV, Parquet) or a COCO-style JSON.

    image      path below the image folder
    sentence   a text; or `sentences`: several
    mask       a PNG file, COCO run lengths, polygons, a bitmap, or a box; empty where `no_target` is true
    split, ref_id, category, image_id, mask_value, no_target, height, width   optional

Cells of a CSV file may hold JSON. docs/data.md shows each form.
"""

import os
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from amltrain.data.sources.annotations import Annotations, MaskFile
from amltrain.data.sources.cells import (
    cell_value,
    clean_sentence,
    hashed_id,
    is_absent,
    is_number_text,
    truth,
    whole_number,
)
from amltrain.data.sources.coco_export import category_names, id_key, images_by_id
from amltrain.data.sources.frame import SIZES_DECIDE, FrameRule, Size
from amltrain.data.sources.own import SHARES, TableRow, build_annotations, check_name
from amltrain.data.sources.pictures import tidy_name
from amltrain.data.sources.table_files import read_table_file
from amltrain.errors import UserError
from amltrain.files import sha256

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
    "height": ("height", "image_height"),
    "width": ("width", "image_width"),
}
"""The names under which a column is found, first match first; capitals and small letters are equal."""


class ReadOptions(NamedTuple):
    """How own data are read. mask_threshold: mask pixels of at least this value are the object. seed, shares: how
    images are assigned to splits where there are none. encoding: of text files that are not UTF-8. rule, links: see
    `Annotations`.
    """

    mask_threshold: int | None = None
    seed: int = 0
    shares: Mapping[str, float] = SHARES
    encoding: str | None = None
    rule: FrameRule = SIZES_DECIDE
    links: bool = False


AS_WRITTEN = ReadOptions()
"""Nothing is asked for: sizes decide, splits are drawn with seed 0."""


class _Reading(NamedTuple):
    """What every row of a table is read with. names: columns of the table by the key of COLUMNS."""

    table: str
    names: dict[str, tuple[str, ...]]
    images: Path
    folders: Sequence[Path]
    threshold: int | None


def read_table(
    table: Path,
    images: Path,
    name: str,
    *,
    masks: Path | None = None,
    columns: Mapping[str, str] | None = None,
    options: ReadOptions = AS_WRITTEN,
) -> Annotations:
    """Read a table or a COCO-style JSON.

    images, masks: folders that paths are relative to; masks: default `images`, then the table's own folder. columns:
    {"image": "photo"} renames. Raises UserError naming the file and the row.
    """
    check_name(name)
    rows, notes = read_rows(table, columns or {}, options.encoding)
    if not rows:
        raise UserError(f"{table} has no rows")
    names = _find_columns(list(dict.fromkeys(key for row in rows for key in row)), columns or {}, str(table))
    folders = [folder for folder in (masks, images, table.parent) if folder is not None]
    reading = _Reading(str(table), names, images, folders, options.mask_threshold)
    filled = [(number, row) for number, row in enumerate(rows, 1) if not all(is_absent(cell) for cell in row.values())]
    parsed = [_parse(row, f"row {number}", reading) for number, row in filled]
    if len(filled) < len(rows):
        notes.append(f"{len(rows) - len(filled):,} rows are empty and were left out")
    if boxes := sum(is_box for _, is_box in parsed):
        notes.append(f"{boxes:,} masks are boxes")
    ids = (row.get(key) for key in names.get("ref_id", ()) for row in rows)
    if any(isinstance(cell, str) and not is_number_text(cell) for cell in ids):
        notes.append("ref_id has texts; they were numbered by their hash")
    return build_annotations(
        [row for row, _ in parsed],
        name,
        sources={table.name: sha256(table)},
        place=str(table),
        seed=options.seed,
        shares=options.shares,
        notes=tuple(notes),
        rule=options.rule,
        links=options.links,
        pictures=images,
    )


def read_rows(
    table: Path, columns: Mapping[str, str], encoding: str | None = None
) -> tuple[list[dict[str, Any]], list[str]]:
    """The rows of a .jsonl, .json (a list, or COCO-style), .csv, .tsv or .parquet file, and notes. Raises UserError."""
    content = read_table_file(table, encoding)
    if isinstance(content, dict):
        found = list(_coco_rows(content, table, columns))
        described = [row for row in found if row is not None]
        left_out = len(found) - len(described)
        if found and not described:
            raise UserError(
                f"{table} has {left_out:,} annotations and no sentence; to write sentences from their classes and "
                f"places, give --describe"
            )
        return described, [f"{left_out:,} annotations have no sentence and were left out"] if left_out else []
    if not isinstance(content, list) or not all(isinstance(row, dict) for row in content):
        raise UserError(f"{table} should hold a list of objects, or be COCO-style (images, annotations)")
    return content, []


def _coco_rows(content: dict[str, Any], table: Path, columns: Mapping[str, str]) -> Iterator[dict[str, Any] | None]:
    """COCO-style: annotations with `sentence` or `sentences` (or `caption`), a segmentation and an image. None stands
    for an annotation without a sentence.
    """
    for key in ("images", "annotations"):
        if not isinstance(content.get(key), list) or not all(isinstance(entry, dict) for entry in content[key]):
            raise UserError(f"{table} has no list {key!r} of objects (it has {', '.join(content) or 'nothing'})")
    images = images_by_id(content["images"], table)
    categories = category_names(content, table)
    kept = {*(key for names in COLUMNS.values() for key in names), *columns.values()}
    texts = (columns["sentence"],) if "sentence" in columns else COLUMNS["sentence"]
    for number, annotation in enumerate(content["annotations"], 1):
        if all(annotation.get(key) in (None, "", []) for key in texts):
            yield None
            continue
        image = images.get(id_key(annotation.get("image_id")))
        if image is None:
            raise UserError(f"{table}, annotation {number}: image {annotation.get('image_id')!r} is not listed")
        row = {key: annotation[key] for key in annotation if key in kept}
        row.pop("image_id", None)
        if annotation.get("segmentation"):
            row.pop("bbox", None)  # of the segmentation, not instead of it
        row |= {"image": image["file_name"], "split": annotation.get("split", image.get("split"))}
        row |= {side: image[side] for side in ("height", "width") if image.get(side)}
        if isinstance(image.get("id"), int):
            row["image_id"] = image["id"]
        if (category := id_key(annotation.get("category_id"))) in categories:
            row["category"] = categories[category]
        yield row


def _find_columns(there: Sequence[str], renamed: Mapping[str, str], place: str) -> dict[str, tuple[str, ...]]:
    """Under which names each of COLUMNS is found. Raises UserError naming the columns that the table has."""
    has = ", ".join(there) or "none"
    unknown = [key for key in renamed if key not in COLUMNS]
    if unknown:
        raise UserError(f"--columns {unknown[0]}: the columns are {', '.join(COLUMNS)}")
    found = {}
    folded: dict[str, list[str]] = {}
    for name in there:
        folded.setdefault(str(name).strip().casefold(), []).append(name)
    for column, names in COLUMNS.items():
        wanted = (renamed[column],) if column in renamed else names
        exact = tuple(name for name in wanted if name in there)
        alike = tuple(match for name in wanted for match in folded.get(name, ()) if column not in renamed)
        if not exact and len(set(alike)) > 1:
            raise UserError(f"{place} has the columns {', '.join(alike)}; choose one: --columns {column}={alike[0]}")
        matches = exact or alike
        if not matches and column in renamed:
            raise UserError(f"{place} has no column {renamed[column]!r}; it has {has}")
        if matches:
            found[column] = matches
    for column in ("image", "sentence"):
        if column not in found:
            raise UserError(f"{place} has no column {column!r}; it has {has} (rename with --columns {column}=NAME)")
    if not found.keys() & {"mask", "box", "no_target"}:
        raise UserError(f"{place} has no column 'mask' or 'box'; it has {has} (rename with --columns mask=NAME)")
    return found


def _parse(row: dict[str, Any], place: str, reading: _Reading) -> tuple[TableRow, bool]:
    """Parse one row; return it and whether its mask is a box. Raises UserError naming the row."""
    where = f"{reading.table}, {place}"
    cell = {
        column: next((row[name] for name in found if not is_absent(row.get(name))), None)
        for column, found in reading.names.items()
        if column != "sentence"
    }
    image = cell["image"]
    if isinstance(image, dict):
        raise UserError(f"{where}: the pictures lie inside the table; read it as a data set: --hf FOLDER")
    if not isinstance(image, str) or not image.strip():
        raise UserError(f"{where}: the image is {reprlib.repr(image)}, not a path")
    value = whole_number(cell.get("mask_value"), "mask_value", where)
    box = _numbers(cell_value(cell.get("box"), f"{where}: the box"))
    mask = cell_value(cell.get("mask"), f"{where}: the mask")
    no_target = truth(cell.get("no_target"), "no_target", where)
    segmentation = None if is_absent(mask) else _segmentation(mask, value, reading, where)
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
        image=_relative(image, reading.images),
        sentences=_texts(row, reading.names["sentence"], where),
        segmentation=segmentation,
        split=_text(cell.get("split"), "the split", where),
        ref_id=_id(cell.get("ref_id"), "ref_id", where),
        image_id=_id(cell.get("image_id"), "image_id", where),
        category=_text(cell.get("category"), "the category", where) or "",
        box=tuple(box) if len(box) == 4 else (),
        size=_size(cell, where),
    )
    return parsed, is_box


def _text(cell: Any, what: str, where: str) -> str | None:
    """A text, or a number as one; None for an empty cell. Raises UserError."""
    if is_absent(cell):
        return None
    if isinstance(cell, bool) or not isinstance(cell, (str, int, float)):
        raise UserError(f"{where}: {what} is {reprlib.repr(cell)}, not a text")
    return str(cell)


def _id(cell: Any, column: str, where: str) -> int | None:
    """An id as a number; a text that is not a number by its hash."""
    if isinstance(cell, str) and not is_absent(cell) and not is_number_text(cell):
        return hashed_id(cell.strip())
    return whole_number(cell, column, where)


def _size(cell: Mapping[str, Any], where: str) -> Size | None:
    """Height and width of the picture that the annotations were made on, where the table states both."""
    height, width = (whole_number(cell.get(side), side, where) for side in ("height", "width"))
    if height is None or width is None:
        return None
    if min(height, width) < 1:
        raise UserError(f"{where}: the height {height} and width {width} are not a picture's size")
    return (height, width)


def _relative(name: str, folder: Path) -> str:
    """A path inside the folder as relative to it; any other path as it is, to be rejected when it is opened."""
    path = Path(name)
    if path.is_absolute() and path.is_relative_to(folder.absolute()):
        return str(path.relative_to(folder.absolute()))
    return name


def _segmentation(mask: Any, value: int | None, reading: _Reading, where: str) -> Any:
    """A mask cell as a MaskFile or, in any form, as it is: its form is told where its picture is read."""
    if isinstance(mask, str):
        names = dict.fromkeys((mask, tidy_name(mask)))
        for name in names:
            for folder in reading.folders:
                if _is_file(folder / _relative(name, folder)):
                    return MaskFile(folder.resolve(), _relative(name, folder), value, reading.threshold)
        if mask.startswith(("iVBOR", "data:image")) or not any(sign in mask for sign in "./\\"):
            return mask  # base64 of a PNG, or a text that is named where it is read
        return MaskFile(reading.folders[0].resolve(), _relative(mask, reading.folders[0]), value, reading.threshold)
    flat = _numbers(mask)
    if len(flat) == 4:
        return box_polygon(flat)
    if isinstance(mask, (list, dict, bytes)):
        return mask
    raise UserError(f"{where}: the mask is a {type(mask).__name__}; give a file, run lengths, polygons or a box")


def _is_file(path: Path) -> bool:
    try:
        return os.path.isfile(path)
    except ValueError:  # a NUL in the name
        return False


def box_polygon(box: Sequence[float]) -> list[list[float]]:
    """A box (x, y, width, height) as a polygon."""
    x, y, width, height = box
    return [[x, y, x + width, y, x + width, y + height, x, y + height]]


def _numbers(cell: Any) -> list[float]:
    """A flat list of numbers, or nothing."""
    if isinstance(cell, (list, tuple)) and all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in cell):
        return list(cell)
    return []


def _texts(row: dict[str, Any], names: Sequence[str], where: str) -> tuple[str, ...]:
    """The sentences of a row. A sentence may be the word `none`, so only an empty cell is empty."""
    cell = next((row[name] for name in names if row.get(name) not in (None, "", []) and row[name] == row[name]), "")
    cell = cell_value(cell, f"{where}: the sentence")
    texts = cell if isinstance(cell, list) else [cell]
    texts = [entry.get("raw", entry.get("sent")) if isinstance(entry, dict) else entry for entry in texts]
    if not all(isinstance(text, str) for text in texts) or not texts:
        raise UserError(f"{where}: the sentence is {str(cell)[:50]!r}, not a text or a list of texts")
    return tuple(clean_sentence(text) for text in texts)
