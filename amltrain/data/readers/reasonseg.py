"""ReasonSeg (LISA, arXiv 2308.00692): questions that need reasoning, one image and one labelme file each.

    <root>/ReasonSeg/train|val|test/X.jpg and X.json

A file: `text` (the sentences), `is_sentence`, `shapes` with `label` and `points`. Shapes are filled from large to
small, as in the official code: `target` is foreground; `ignore` marks pixels that LISA leaves out of the
score and that are background here; `flag` is unused. Outlines count as filled.
"""

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from amltrain.data.annotations import Annotations, check_entry
from amltrain.data.json_files import load_json
from amltrain.data.own import TableRow, build_annotations
from amltrain.data.segmentation import MAX_PIXELS, encode_mask
from amltrain.data.specs import dataset_spec
from amltrain.errors import UserError, first_line


def read_reasonseg(root: Path, name: str) -> Annotations:
    """Read every split that is there. Raises UserError."""
    import hashlib

    spec = dataset_spec(name)
    folder = root / spec.folder if (root / spec.folder).is_dir() else root
    files = {split: sorted((folder / split).glob("*.json")) for split in spec.splits}
    files = {split: paths for split, paths in files.items() if paths}
    if not files:
        raise UserError(f"{folder} has no train/*.json; put ReasonSeg's folders there")
    ignored = 0
    rows = []
    digest = hashlib.sha256()
    for split, paths in files.items():
        for path in paths:
            content = load_json(path, encodings=("utf-8", "cp1252"))
            digest.update(f"{split}/{path.name} {content}".encode(errors="replace"))
            row, has_ignored = _row(content, path, split)
            rows.append(row)
            ignored += has_ignored
    notes = (f"{ignored} images have `ignore` regions; here they are background",) if ignored else ()
    used = spec._replace(splits=tuple(files), published={s: spec.published[s] for s in files})
    sources = {spec.folder: digest.hexdigest()}
    return build_annotations(rows, name, sources=sources, place=str(folder), spec=used, notes=notes)


def _row(content: Any, path: Path, split: str) -> tuple[TableRow, bool]:
    check_entry(content, ("text", "shapes"), "the file", str(path))
    texts = content["text"] if isinstance(content["text"], list) else [content["text"]]
    if not all(isinstance(text, str) for text in texts):
        raise UserError(f"{path}: `text` is not a list of texts")
    image = path.with_suffix(".jpg")
    size = _size(image)
    mask, ignored = _mask(content["shapes"], size, path)
    row = TableRow(path.name, f"{split}/{image.name}", tuple(texts), mask, split, size=size)
    return row, ignored


def _size(image: Path) -> tuple[int, int]:
    try:
        if not image.is_file():
            raise UserError(f"{image} is missing")
        with Image.open(image) as opened:
            size = (opened.height, opened.width)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{image} is damaged ({first_line(error)})") from error
    if size[0] * size[1] > MAX_PIXELS:
        raise UserError(f"{image} has {size[1]} x {size[0]} pixels, which is too large")
    return size


def _mask(shapes: Any, size: tuple[int, int], path: Path) -> tuple[dict[str, Any], bool]:
    """The target as run lengths, and whether some region is to be ignored."""
    drawn: list[tuple[int, np.ndarray, bool]] = []
    for number, shape in enumerate(shapes if isinstance(shapes, list) else ()):
        check_entry(shape, ("label", "points"), f"shape {number}", str(path))
        label = str(shape["label"]).lower()
        if label == "flag":
            continue
        if "target" not in label and "ignore" not in label:
            raise UserError(f"{path}: shape {number} has the label {shape['label']!r}, not target or ignore")
        try:
            points = [(int(x), int(y)) for x, y in shape["points"]]
        except (TypeError, ValueError, OverflowError) as error:
            raise UserError(f"{path}: shape {number} has points that are not coordinates") from error
        limit = 4 * max(size)
        if len(points) < 2 or any(abs(c) > limit for point in points for c in point):
            raise UserError(f"{path}: shape {number} has too few points, or points far outside the image")
        canvas = Image.new("1", (size[1], size[0]))
        ImageDraw.Draw(canvas).polygon(points, fill=1, outline=1)
        region = np.asarray(canvas)
        drawn.append((int(region.sum()), region, "ignore" in label))
    mask = np.zeros(size, np.uint8)
    for _, region, ignore in sorted(drawn, key=lambda entry: -entry[0]):
        mask[region] = 0 if ignore else 1
    return encode_mask(mask), any(ignore for _, _, ignore in drawn)
