"""CVAT's own XML ("CVAT for images 1.1"): annotations.xml, and images/ where they were exported with it.

An image has name, width, height and subset; its shapes are polygon, box (with rotation), ellipse and mask (run lengths
along the rows of a crop: rle, left, top, width, height); polyline, points and cuboid are no areas. Shapes of one
group_id and label are one object. Attributes named sentence, caption and so on hold sentences. CVAT's COCO export is
read by `coco_export`, its YOLO and Pascal VOC exports by their readers.
"""

import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import numpy as np

from amltrain.data.segmentation import MAX_PIXELS
from amltrain.data.sources.cells import split_name
from amltrain.data.sources.frame import FrameRule, Size
from amltrain.data.sources.objects import (
    Counted,
    Digest,
    Imported,
    ImportOptions,
    ellipse,
    find_picture,
    joined,
    label_of,
    numbers,
    placed,
    rectangle,
    sentences_of,
    stated_size,
)
from amltrain.data.sources.own import TableRow
from amltrain.data.sources.pictures import PictureFinder
from amltrain.errors import UserError, first_line
from amltrain.files import read_bytes

_NO_AREA = {"polyline", "points", "cuboid", "skeleton", "tag"}


def cvat_file(path: Path) -> Path | None:
    """The XML file of CVAT at a path or in a folder; None where there is none."""
    file = path / "annotations.xml" if path.is_dir() else path
    if file.suffix.lower() != ".xml" or not file.is_file():
        return None
    with file.open("rb") as opened:
        start = opened.read(4096)
    return file if b"<annotations" in start else None


def parse_xml(content: bytes, place: str) -> ElementTree.Element:
    """The root of an XML file. A document type is rejected: its entities can grow without bound. Raises UserError."""
    if b"<!DOCTYPE" in content or b"<!ENTITY" in content:
        raise UserError(f"{place} declares a document type, which annotation files do not need; remove it")
    try:
        return ElementTree.fromstring(content)
    except (ElementTree.ParseError, ValueError, LookupError) as error:
        raise UserError(f"{place} is not XML ({first_line(error)})") from error


def read_cvat(path: Path, options: ImportOptions) -> Imported:
    """Read CVAT's XML file, or the folder of its export. Raises UserError that names image and shape."""
    file = cvat_file(path)
    if file is None:
        raise UserError(f"{path} has no annotations.xml of CVAT")
    content = read_bytes(file)
    root = parse_xml(content, str(file))
    if root.find("track") is not None:
        raise UserError(f"{file} is a CVAT video (it has tracks); export the task as `CVAT for images 1.1`")
    folder = file.parent / "images"
    images = options.images or (folder if folder.is_dir() else file.parent)
    finder, counted, digest = PictureFinder(images, by_base_name=True), Counted(), Digest()
    digest.add(file.name, content)
    rows: list[TableRow] = []
    for image in root.findall("image"):
        rows += _image_rows(image, file, finder, counted)
    if not rows and root.find("image") is None:
        raise UserError(f"{file} has no image; export the task as `CVAT for images 1.1`")
    return Imported(rows, images, {file.name: digest.hexdigest()}, counted.notes(), FrameRule("upright"))


def _image_rows(image: ElementTree.Element, file: Path, finder: PictureFinder, counted: Counted) -> list[TableRow]:
    name = image.get("name") or ""
    where = f"{file}, image {name[:100]!r}"
    size = stated_size(image.get("height"), image.get("width"), where)
    objects: dict[Any, dict[str, Any]] = {}
    for number, shape in enumerate(image):
        at = f"{where}, shape {number}"
        if shape.tag in _NO_AREA:
            counted.add("polylines, points, cuboids and tags are no areas and were left out", f"{shape.tag} of {name}")
            continue
        part = _part(shape, size, at)
        label, group = label_of(shape.get("label"), at), shape.get("group_id") or "0"
        key = (label, group) if group != "0" else number
        found = objects.setdefault(key, {"label": label, "parts": [], "texts": (), "at": number})
        found["parts"].append(part)
        attributes = {a.get("name") or "": a.text or "" for a in shape.findall("attribute")}
        found["texts"] += sentences_of(attributes, at)
    if not objects:
        return []
    found_picture = find_picture(finder, _with_subset(name, image.get("subset"), finder), where)
    return [
        TableRow(
            place=f"shape {entry['at']} of image {name}",
            image=found_picture,
            sentences=tuple(dict.fromkeys(entry["texts"])),
            segmentation=joined(entry["parts"], size),
            split=_split(image.get("subset")),
            category=entry["label"],
            size=size,
        )
        for entry in objects.values()
    ]


def _with_subset(name: str, subset: str | None, finder: PictureFinder) -> str:
    """Exports of a project keep pictures in a folder named after their subset."""
    inside = f"{subset}/{name}" if subset else name
    return inside if finder.find(inside) is not None else name


def _split(subset: str | None) -> str | None:
    return None if (subset or "default").casefold() == "default" else split_name(subset)


def _part(shape: ElementTree.Element, size: Size, where: str) -> Any:
    """A flat polygon, or run lengths of the picture's size."""
    if shape.tag == "polygon":
        pairs = (shape.get("points") or "").split(";")
        return [number for pair in pairs for number in numbers(pair.split(","), 2, "a point", where)]
    if shape.tag == "box":
        corners = numbers([shape.get(key) for key in ("xtl", "ytl", "xbr", "ybr")], 4, "the box", where)
        return rectangle(corners[0], corners[1], corners[2], corners[3], _turn(shape, where))
    if shape.tag == "ellipse":
        cx, cy, rx, ry = numbers([shape.get(key) for key in ("cx", "cy", "rx", "ry")], 4, "the ellipse", where)
        return ellipse(cx, cy, rx, ry, _turn(shape, where))
    if shape.tag == "mask":
        return _mask(shape, size, where)
    raise UserError(f"{where}: the shape {shape.tag!r} is not known (polygon, box, ellipse, mask)")


def _turn(shape: ElementTree.Element, where: str) -> float:
    return numbers([shape.get("rotation") or 0], 1, "the rotation", where)[0]


def _mask(shape: ElementTree.Element, size: Size, where: str) -> dict[str, Any]:
    """A mask's crop from its run lengths, background first, along the rows."""
    left, top, width, height = (
        int(number)
        for number in numbers([shape.get(key) for key in ("left", "top", "width", "height")], 4, "the mask", where)
    )
    lengths = numbers((shape.get("rle") or "").split(","), None, "the run lengths", where)
    pixels = width * height
    if min(width, height) < 1 or pixels > MAX_PIXELS or not 0 <= min(lengths) <= max(lengths) <= pixels:
        raise UserError(f"{where}: the run lengths or the size of the mask are out of range")
    runs = np.array(lengths, np.int64)
    if runs.sum() != pixels:
        raise UserError(f"{where}: the run lengths do not add up to {width} x {height} pixels")
    crop = np.repeat((np.arange(len(runs)) & 1).astype(np.uint8), runs).reshape(height, width)
    return placed(crop, left, top, size, where)
