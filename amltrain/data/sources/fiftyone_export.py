"""FiftyOne's own export (`FiftyOneDataset`): samples.json, metadata.json and data/.

A sample: filepath, tags, metadata (width, height) and label fields. Detections: label, bounding_box (x, y, width,
height as shares), mask (an array of the box, as base64 of zlib of NumPy's format) or mask_path, and attributes.
Polylines: points as shares, by part; filled ones are areas. Sentences are attributes named sentence, caption and so on.
FiftyOne's COCO, YOLO and VOC exports are read as those.
"""

import base64
import binascii
import io
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from amltrain.data.images import exif_turn, pixel_values
from amltrain.data.segmentation import MAX_PIXELS
from amltrain.data.sources.cells import parse_json, read_text, split_name
from amltrain.data.sources.frame import FrameRule, Size, upright_size
from amltrain.data.sources.objects import (
    SPLIT_FOLDERS,
    Counted,
    Digest,
    Imported,
    ImportOptions,
    find_picture,
    joined,
    label_of,
    mapping,
    numbers,
    placed,
    rectangle,
    sentences_of,
)
from amltrain.data.sources.own import TableRow
from amltrain.data.sources.pictures import PictureFinder
from amltrain.errors import UserError, first_line

_KINDS = {"Detections": "detections", "Polylines": "polylines"}


def is_fiftyone(content: Any) -> bool:
    """Whether a JSON file's content is FiftyOne's list of samples."""
    samples = content.get("samples") if isinstance(content, dict) else None
    return isinstance(samples, list) and bool(samples) and isinstance(samples[0], dict) and "filepath" in samples[0]


def read_fiftyone(path: Path, options: ImportOptions) -> Imported:
    """Read an exported folder, or its samples.json. Raises UserError that names sample and label."""
    file = path / "samples.json" if path.is_dir() else path
    text = read_text(file, options.encoding)
    content = parse_json(text, str(file))
    if not is_fiftyone(content):
        raise UserError(f"{file} is not FiftyOne's export (an object with samples, each with a filepath)")
    field = options.label_field or _field(content["samples"], str(file))
    root = options.images or file.parent
    finder, counted, digest = PictureFinder(root, by_base_name=True), Counted(), Digest()
    digest.add(file.name, text.encode(errors="replace"))
    rows: list[TableRow] = []
    for number, sample in enumerate(content["samples"]):
        rows += _sample_rows(sample, f"{file}, sample {number}", field, finder, counted)
    if not rows:
        raise UserError(f"{file}: the field {field!r} has no detection and no filled polyline")
    return Imported(rows, root, {file.name: digest.hexdigest()}, counted.notes(), FrameRule("upright"))


def _field(samples: list[Any], place: str) -> str:
    """The one field with areas. Raises UserError where there are several or none."""
    found = dict.fromkeys(
        name
        for sample in samples
        if isinstance(sample, dict)
        for name, value in sample.items()
        if isinstance(value, dict) and str(value.get("_cls")) in _KINDS
    )
    if len(found) != 1:
        what = f"has the label fields {', '.join(found)}" if found else "has no field of Detections or Polylines"
        raise UserError(f"{place} {what}; choose one with --label_field")
    return next(iter(found))


def _sample_rows(sample: Any, where: str, field: str, finder: PictureFinder, counted: Counted) -> list[TableRow]:
    if not isinstance(sample, dict) or not isinstance(sample.get("filepath"), str):
        raise UserError(f"{where} has no filepath")
    value = sample.get(field)
    if not isinstance(value, dict) or str(value.get("_cls")) not in _KINDS:
        return []
    labels = value.get(_KINDS[value["_cls"]]) or []
    if not isinstance(labels, list):
        raise UserError(f"{where}: the labels of {field!r} are not a list")
    if not labels:
        return []
    image = find_picture(finder, sample["filepath"], where)
    size = _upright_size(finder.root / image)
    listed = sample.get("tags")
    tags = [tag for tag in listed if isinstance(tag, str)] if isinstance(listed, list) else []
    tags = [tag for tag in tags if tag.casefold() in SPLIT_FOLDERS]
    split = split_name(tags[0]) if tags else None
    rows = []
    for number, label in enumerate(labels):
        at = f"{where}, label {number}"
        if not isinstance(label, dict):
            raise UserError(f"{at} is a {type(label).__name__}, not an object")
        segmentation = _area(label, size, finder, at, counted)
        if segmentation is None:
            continue
        given = mapping(label.get("attributes")).items()
        extra = {key: entry.get("value") if isinstance(entry, dict) else entry for key, entry in given}
        texts = sentences_of({**extra, **label}, at)
        category = label_of(label.get("label") or "", at)
        place = f"label {number} of {image}"
        rows.append(TableRow(place, image, texts, segmentation, split, category=category, size=size))
    return rows


def _upright_size(path: Path) -> Size:
    """The size of the upright picture, from its header; FiftyOne's shares are of what it shows."""
    try:
        with Image.open(path) as image:
            return upright_size((image.height, image.width), exif_turn(image))
    except Exception as error:  # Pillow's plugins raise almost anything for a damaged file
        raise UserError(f"{path} is damaged ({first_line(error)})") from error


def _area(label: dict[str, Any], size: Size, finder: PictureFinder, where: str, counted: Counted) -> Any:
    """A label's area as polygons or run lengths; None for a line."""
    height, width = size
    if label.get("_cls") == "Polyline":
        if not (label.get("filled") and label.get("closed", True)):
            counted.add("polylines are not filled and were left out", where)
            return None
        parts = label.get("points")
        if not isinstance(parts, list) or not all(isinstance(part, list) for part in parts):
            raise UserError(f"{where}: the points are not lists of points by part")
        polygons = [[c for point in part for c in numbers(point, 2, "a point", where)] for part in parts]
        return [[c * size[1 - i % 2] for i, c in enumerate(polygon)] for polygon in polygons]
    x, y, w, h = numbers(label.get("bounding_box") or (), 4, "bounding_box", where)
    if max(map(abs, (x, y, w, h))) > 2 or min(w, h) <= 0:
        raise UserError(f"{where}: bounding_box {[x, y, w, h]} is not x, y, width, height as shares of the picture")
    mask = _mask(label, finder, where)
    if mask is None:
        return [rectangle(x * width, y * height, (x + w) * width, (y + h) * height)]
    left, top = round(x * width), round(y * height)
    wanted = (max(1, round(h * height)), max(1, round(w * width)))
    if mask.shape != wanted:
        resized = Image.fromarray(mask * np.uint8(255)).resize(wanted[::-1], Image.Resampling.NEAREST)
        mask = (np.asarray(resized) > 0).astype(np.uint8)
    return joined([placed(mask, left, top, size, where)], size)


def _mask(label: dict[str, Any], finder: PictureFinder, where: str) -> NDArray[np.uint8] | None:
    """A detection's mask of its box, [h, w] of 0 and 1; None where it has none."""
    given = label.get("mask")
    if isinstance(given, dict):  # MongoDB's extended JSON
        binary = given.get("$binary")
        given = binary.get("base64") if isinstance(binary, dict) else binary
    if given is None and isinstance(label.get("mask_path"), str):
        return _mask_file(label["mask_path"], finder, where)
    if given is None:
        return None
    try:
        packed = zlib.decompressobj()
        content = packed.decompress(base64.b64decode(given, validate=True), MAX_PIXELS + 4096)
        array = np.load(io.BytesIO(content), allow_pickle=False)
    except (binascii.Error, zlib.error, ValueError, TypeError, EOFError, OSError) as error:
        raise UserError(f"{where}: the mask cannot be read ({first_line(error)})") from error
    if array.ndim != 2 or not array.size:
        raise UserError(f"{where}: the mask has the shape {array.shape}, not two sides")
    return (array != 0).astype(np.uint8)


def _mask_file(name: str, finder: PictureFinder, where: str) -> NDArray[np.uint8]:
    path = finder.root / find_picture(finder, name, where)
    try:
        with Image.open(path) as image:
            return (pixel_values(image) != 0).astype(np.uint8)
    except Exception as error:  # Pillow's plugins raise almost anything for a damaged file
        raise UserError(f"{where}: {path} is damaged ({first_line(error)})") from error
