"""LabelMe: one JSON file per picture, with shapes; the picture beside it or inside it (`imageData`).

A shape: label, points, shape_type (polygon, rectangle, rotation, circle, mask; points and lines are no areas),
group_id (shapes of one label and group are one object), description (the sentences, a line each), flags. LabelMe shows
pictures upright and states the upright size. Layout: labelme 5.
"""

import base64
import binascii
import hashlib
import math
import shutil
from pathlib import Path
from typing import Any

from amltrain.data.images import FileFault, decode_file
from amltrain.data.segmentation import BrokenSegmentationError
from amltrain.data.sources.cells import parse_json, read_text, split_name
from amltrain.data.sources.frame import FrameRule, Size
from amltrain.data.sources.mask_forms import png_mask
from amltrain.data.sources.objects import (
    SPLIT_FOLDERS,
    Counted,
    Digest,
    Imported,
    ImportOptions,
    ellipse,
    find_picture,
    joined,
    label_of,
    mapping,
    placed,
    point_pairs,
    rectangle,
    sentences_of,
    split_of_path,
    stated_size,
)
from amltrain.data.sources.own import TableRow
from amltrain.data.sources.pictures import PictureFinder, tidy_name
from amltrain.errors import UserError

_NO_AREA = {"point", "points", "line", "linestrip"}


def is_labelme(content: Any) -> bool:
    """Whether a JSON file's content is LabelMe's."""
    return isinstance(content, dict) and "shapes" in content and bool({"imagePath", "imageData"} & content.keys())


def read_labelme(path: Path, options: ImportOptions) -> Imported:
    """Read a folder of LabelMe's files, or one file. Raises UserError that names file and shape."""
    files = sorted(path.rglob("*.json")) if path.is_dir() else [path]
    root = options.images or (path if path.is_dir() else path.parent)
    finder = PictureFinder(root, by_base_name=True)
    counted, digest = Counted(), Digest()
    rows: list[TableRow] = []
    for file in files:
        text = read_text(file, options.encoding)
        content = parse_json(text, str(file))
        if not is_labelme(content):
            counted.add("JSON files are not LabelMe's and were left out", file.name)
            continue
        relative = file.relative_to(path).as_posix() if path.is_dir() else file.name
        digest.add(relative, text.encode(errors="replace"))
        rows += _file_rows(content, file, relative, finder, options, counted)
    if any(Path(row.image).is_absolute() for row in rows):  # one folder has to hold all pictures
        rows, root = _gathered(rows, root, options.scratch), options.scratch
    return Imported(rows, root, {path.name: digest.hexdigest()}, counted.notes(), FrameRule("upright"))


def _gathered(rows: list[TableRow], root: Path, scratch: Path) -> list[TableRow]:
    """Rows whose pictures all lie in `scratch`: those that were not inside an annotation file are copied there."""
    moved = []
    for row in rows:
        path = Path(row.image)
        if path.is_absolute():
            moved.append(row._replace(image=path.name))
            continue
        try:
            (scratch / row.image).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(root / row.image, scratch / row.image)
        except OSError as error:
            raise UserError(f"could not copy {root / row.image} to {scratch} ({error.strerror or error})") from error
        moved.append(row)
    return moved


def _file_rows(
    content: dict[str, Any], file: Path, relative: str, finder: PictureFinder, options: ImportOptions, counted: Counted
) -> list[TableRow]:
    size = stated_size(content.get("imageHeight"), content.get("imageWidth"), str(file))
    image = _picture(content, file, relative, finder, options)
    if not isinstance(content["shapes"], list):
        raise UserError(f"{file}: 'shapes' is not a list")
    objects: dict[Any, dict[str, Any]] = {}
    for number, shape in enumerate(content["shapes"]):
        where = f"{file}, shape {number}"
        if not isinstance(shape, dict) or not {"label", "points"} <= shape.keys():
            raise UserError(f"{where} has no label or no points")
        kind = str(shape.get("shape_type") or "polygon")
        label = label_of(shape["label"], where)
        if kind in _NO_AREA:
            counted.add("points and lines are no areas and were left out", f"{kind} {label!r} in {file.name}")
            continue
        group = shape.get("group_id")
        found = objects.setdefault(
            (label, repr(group)) if group is not None else number,
            {"label": label, "parts": [], "texts": (), "at": number},
        )
        found["parts"].append(_part(shape, kind, size, where))
        found["texts"] += sentences_of({**mapping(shape.get("attributes")), **shape}, where)
    split = split_name(split_of_path(relative, SPLIT_FOLDERS))
    return [
        TableRow(
            place=f"shape {entry['at']} of {relative}",
            image=image,
            sentences=tuple(dict.fromkeys(entry["texts"])),
            segmentation=joined(entry["parts"], size),
            split=split,
            category=entry["label"],
            size=size,
        )
        for entry in objects.values()
    ]


def _part(shape: dict[str, Any], kind: str, size: Size, where: str) -> Any:
    points = point_pairs(shape["points"], where)
    if kind in ("polygon", "rotation", "oriented_rectangle"):
        return points
    if len(points) != 4 and kind in ("rectangle", "circle", "mask"):
        if kind == "rectangle" and len(points) == 8:
            return points  # four corners
        raise UserError(f"{where}: a {kind} has two points, this one {len(points) // 2}")
    if kind == "rectangle":
        return rectangle(*points)
    if kind == "circle":
        radius = math.dist(points[:2], points[2:])
        return ellipse(points[0], points[1], radius, radius)
    if kind == "mask":
        try:
            content = base64.b64decode(shape.get("mask") or "", validate=True)
            return placed(png_mask(content), round(points[0]), round(points[1]), size, where)
        except (binascii.Error, ValueError, TypeError) as error:
            if isinstance(error, UserError):
                raise
            reason = str(error) if isinstance(error, BrokenSegmentationError) else "it is not base64"
            raise UserError(f"{where}: the mask cannot be read: {reason}") from error
    raise UserError(f"{where}: the shape type {kind!r} is not known (polygon, rectangle, circle, mask)")


def _picture(content: dict[str, Any], file: Path, relative: str, finder: PictureFinder, options: ImportOptions) -> str:
    """The picture beside the file; where it is missing, the one inside the file, written out."""
    named = content.get("imagePath")
    name = tidy_name(named) if isinstance(named, str) else ""
    folder = relative.rpartition("/")[0]
    beside = f"{folder}/{name}" if folder else name
    for candidate in (beside, name) if name else ():
        if (found := finder.find(candidate)) is not None:
            return found
    data = content.get("imageData")
    if not data:
        return find_picture(finder, name or file.stem, str(file))
    try:
        inside = base64.b64decode(data, validate=True)
        ending = (decode_file(inside).format or "png").lower()
    except (binascii.Error, ValueError, TypeError) as error:
        raise UserError(f"{file}: imageData is not base64") from error
    except FileFault as error:
        raise UserError(f"{file}: the picture in imageData cannot be used: {error}") from error
    written = options.scratch / f"{hashlib.sha256(inside).hexdigest()[:24]}.{ending}"
    try:
        written.parent.mkdir(parents=True, exist_ok=True)
        if not written.exists():
            written.write_bytes(inside)
    except OSError as error:
        raise UserError(f"could not write {written} ({error.strerror or error})") from error
    return str(written.absolute())
