"""COCO's JSON as tools export it: Roboflow (a file per split), CVAT, FiftyOne, detectron2's data sets, COCO itself.

    train/_annotations.coco.json with pictures beside it, valid/, test/          Roboflow
    annotations/instances_train2017.json and train2017/, or images/train/        COCO, CVAT
    data/ and labels.json                                                        FiftyOne

All files of a folder are read in one call; a file's split is its folder or the split in its name. Sentences are in an
annotation's `sentence`, `sentences`, `caption`, or in its `attributes` (CVAT). Objects without a sentence are kept as
such; without a segmentation their box is the area. Ids need only be unique in their file.
"""

import json
import re
from pathlib import Path
from typing import Any

from amltrain.data.sources.cells import decode_text, split_name
from amltrain.data.sources.frame import FrameRule, Size
from amltrain.data.sources.objects import (
    SPLIT_FOLDERS,
    Counted,
    Digest,
    Imported,
    ImportOptions,
    find_picture,
    label_of,
    numbers,
    rectangle,
    sentences_of,
    stated_size,
)
from amltrain.data.sources.own import TableRow
from amltrain.data.sources.pictures import PictureFinder, tidy_name
from amltrain.errors import UserError, first_line
from amltrain.files import read_bytes

_IN_NAME = re.compile(r"(?:^|[_\-. ])(train|training|valid|validation|val|testing|test|dev)(?=20\d\d|[_\-. ]|$)", re.I)


def is_coco(content: Any) -> bool:
    """Whether a JSON file's content has COCO's lists of pictures and annotations."""
    return isinstance(content, dict) and all(isinstance(content.get(key), list) for key in ("images", "annotations"))


def coco_files(path: Path) -> list[Path]:
    """JSON files at a path that may be COCO's: by their first bytes, which is cheap for files of gigabytes."""
    files = [path] if path.is_file() else sorted([*path.glob("*.json"), *path.glob("*/*.json")])
    return [file for file in files if file.suffix.lower() == ".json" and _may_be_coco(file)]


def _may_be_coco(file: Path) -> bool:
    with file.open("rb") as opened:
        start = opened.read(1 << 16)
        opened.seek(0, 2)
        opened.seek(max(0, opened.tell() - (1 << 16)))
        end = opened.read()
        whole = opened.tell() <= 2 << 16
    found = [key in start + end for key in (b'"images"', b'"annotations"')]
    return start.lstrip()[:1] == b"{" and (all(found) if whole else any(found))


def read_coco_export(path: Path, options: ImportOptions) -> Imported:
    """Read one file, or all COCO files of a folder. Raises UserError that names file and annotation."""
    files = coco_files(path)
    if not files:
        raise UserError(f"{path} has no COCO JSON (images, annotations)")
    base = path if path.is_dir() else path.parent
    root = options.images or base
    finder, counted, digest = PictureFinder(root, by_base_name=True), Counted(), Digest()
    rows: list[TableRow] = []
    read = 0
    for file in files:
        content = read_bytes(file)
        try:
            parsed = json.loads(decode_text(content, str(file), options.encoding))
        except UserError:
            raise
        except (ValueError, RecursionError) as error:
            raise UserError(f"{file} is not JSON ({first_line(error)})") from error
        if not is_coco(parsed):
            continue
        read += 1
        digest.add(file.relative_to(base).as_posix(), content)
        rows += _file_rows(parsed, file, base, root, finder, counted)
    if not read:
        raise UserError(f"{path} has no COCO JSON (images, annotations)")
    sources = {path.name: digest.hexdigest()}
    return Imported(rows, root, sources, counted.notes(), FrameRule())


def split_of_file(file: Path, base: Path) -> str | None:
    """The split in a file's name (instances_val2017.json), else its folder's; None where neither names one."""
    named = _IN_NAME.findall(file.stem)
    if named:
        return split_name(named[-1])
    folder = file.parent.name if file.parent != base else ""
    return split_name(folder) if folder.casefold() in SPLIT_FOLDERS else None


def _file_rows(
    content: dict[str, Any], file: Path, base: Path, root: Path, finder: PictureFinder, counted: Counted
) -> list[TableRow]:
    images = images_by_id(content["images"], file)
    categories = category_names(content, file)
    split = split_of_file(file, base)
    places = _places(file, base, root, split)
    rows = []
    seen: dict[Any, int] = {}
    names: dict[str, str] = {}
    for number, annotation in enumerate(content["annotations"]):
        where = f"{file}, annotation {number}"
        if not isinstance(annotation, dict):
            raise UserError(f"{where} is a {type(annotation).__name__}, not an object")
        own = annotation.get("id")
        if own is not None and seen.setdefault(repr(own), number) != number:
            counted.add("annotations have an id that another one has; all were kept", f"id {own} in {file.name}")
        image = images.get(id_key(annotation.get("image_id")))
        if image is None:
            counted.add("annotations are of a picture that is not listed and were left out", f"{where}")
            continue
        segmentation, box = _area(annotation, where)
        if segmentation is None:
            counted.add("annotations have neither a segmentation nor a box and were left out", where)
            continue
        category = categories.get(id_key(annotation.get("category_id")), "")
        texts = sentences_of({**_attributes(annotation), **annotation}, where)
        name = names.get(image["file_name"]) or _picture(image, places, finder, f"{file}, image {image.get('id')!r}")
        names[image["file_name"]] = name
        own_split = split_name(annotation.get("split") or image.get("split"))
        size = _size(image, f"{file}, image {image.get('id')!r}")
        place = f"annotation {own if own is not None else number} of {file.name}"
        crowd = bool(annotation.get("iscrowd"))
        own_split = own_split or split
        rows.append(TableRow(place, name, texts, segmentation, own_split, None, None, category, box, size, crowd))
    if all(row.crowd for row in rows):  # CVAT marks every mask so
        rows = [row._replace(crowd=False) for row in rows]
    return rows


def images_by_id(images: list[Any], file: Path) -> dict[str, dict[str, Any]]:
    """Entries by `id_key`; an id of two different pictures is rejected, because its annotations could be of either."""
    found: dict[str, dict[str, Any]] = {}
    for number, entry in enumerate(images):
        if not isinstance(entry, dict) or "id" not in entry or not isinstance(entry.get("file_name"), str):
            raise UserError(f"{file}: image number {number} has no id or no file_name")
        other = found.setdefault(id_key(entry["id"]), entry)
        if tidy_name(other["file_name"]) != tidy_name(entry["file_name"]):
            raise UserError(
                f"{file}: image id {entry['id']!r} is of {other['file_name'][:100]!r} and of "
                f"{entry['file_name'][:100]!r}; give every picture its own id"
            )
    return found


def category_names(content: dict[str, Any], file: Path) -> dict[str, str]:
    """Names of a file's categories by `id_key`. Raises UserError for a name that is no text."""
    listed = content.get("categories")
    return {
        id_key(entry.get("id")): label_of(entry.get("name"), f"{file}, category {str(entry.get('id'))[:50]}")
        for entry in (listed if isinstance(listed, list) else [])
        if isinstance(entry, dict)
    }


def id_key(value: Any) -> str:
    """An id for comparison: 3, 3.0 and "3" are one."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return str(value).strip()


def _attributes(annotation: dict[str, Any]) -> dict[str, Any]:
    given = annotation.get("attributes")
    return given if isinstance(given, dict) else {}


def _area(annotation: dict[str, Any], where: str) -> tuple[Any, tuple[float, ...]]:
    """Segmentation (the box's polygon where there is none) and box."""
    given = annotation.get("bbox")
    box = tuple(numbers(given, 4, "bbox", where)) if given else ()
    segmentation = annotation.get("segmentation")
    if segmentation:
        return segmentation, box
    if not box or min(box[2:]) <= 0:
        return None, box
    x, y, w, h = box
    return [rectangle(x, y, x + w, y + h)], box


def _size(image: dict[str, Any], where: str) -> Size | None:
    height, width = image.get("height"), image.get("width")
    if height in (None, 0) or width in (None, 0):
        return None
    return stated_size(height, width, where)


def _places(file: Path, base: Path, root: Path, split: str | None) -> list[str]:
    """Folders below the root in which a file's pictures may lie, most likely first."""
    own = file.parent.relative_to(base).as_posix() if root == base else "."
    named = [name for name in (file.stem.rpartition("_")[2], split) if name]
    folders = [own, "", *named, *(f"images/{name}" for name in named), "images", "data"]
    return list(dict.fromkeys("" if folder == "." else folder for folder in folders))


def _picture(image: dict[str, Any], places: list[str], finder: PictureFinder, where: str) -> str:
    name = tidy_name(image["file_name"])
    for place in places:
        inside = f"{place}/{name}" if place else name
        if (finder.root / inside).is_file() and ".." not in inside.split("/"):
            return inside
    return find_picture(finder, image["file_name"], where)
