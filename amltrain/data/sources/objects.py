"""What every importer makes of a tool's objects: one source row each, with the parts joined and the sentences found."""

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from amltrain.data.segmentation import MAX_PIXELS, decode_mask, encode_mask, referent_mask
from amltrain.data.sources.cells import clean_sentence, text_fault
from amltrain.data.sources.frame import FrameRule, Size
from amltrain.data.sources.own import TableRow
from amltrain.data.sources.pictures import PictureFinder
from amltrain.errors import UserError

SENTENCE_KEYS = (
    "sentence",
    "sentences",
    "expression",
    "expressions",
    "referring_expression",
    "caption",
    "captions",
    "phrase",
    "text",
    "description",
)
"""Names of attributes that hold an object's sentences, in small letters."""


class ImportOptions(NamedTuple):
    """images: folder of the pictures, None = where the tool's export has them. scratch: a folder for pictures that lie
    inside the annotation files. encoding: of text files that are not UTF-8. label_field: of FiftyOne's samples.
    """

    images: Path | None
    scratch: Path
    encoding: str | None = None
    label_field: str | None = None


class Imported(NamedTuple):
    """rows: one per object; sentences are empty where the tool has none. images: the folder that their paths start
    from. sources: SHA-256 of what was read. notes: what a person should know. rule: see `frame`.
    """

    rows: list[TableRow]
    images: Path
    sources: dict[str, str]
    notes: tuple[str, ...] = ()
    rule: FrameRule = FrameRule()


class Counted:
    """Counts what a tool's files have and no row can hold; each kind becomes a note with its first example."""

    def __init__(self) -> None:
        self._found: dict[str, tuple[int, str]] = {}

    def add(self, kind: str, example: str) -> None:
        count, first = self._found.get(kind, (0, example))
        self._found[kind] = (count + 1, first)

    def notes(self) -> tuple[str, ...]:
        return tuple(f"{count:,} {kind} (e.g. {example})" for kind, (count, example) in self._found.items())


class Digest:
    """One SHA-256 over several files' contents and names."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()

    def add(self, name: str, content: bytes) -> None:
        self._hash.update(f"{name} {len(content)}\n".encode(errors="replace") + content)

    def hexdigest(self) -> str:
        return self._hash.hexdigest()


def sentences_of(attributes: Mapping[str, Any], where: str) -> tuple[str, ...]:
    """Sentences of the first attribute whose name says so: a text of one or more lines, or a list. Raises UserError."""
    folded = {str(key).strip().casefold(): value for key, value in attributes.items()}
    for key in SENTENCE_KEYS:
        value = folded.get(key)
        if value in (None, "", []):
            continue
        texts = value if isinstance(value, list) else str(value).split("\n")
        if not all(isinstance(text, str) for text in texts):
            raise UserError(f"{where}: {key} is {str(value)[:50]!r}, not a text or a list of texts")
        found = tuple(text for text in map(clean_sentence, texts) if text)
        if found:
            return found
    return ()


def label_of(value: Any, where: str) -> str:
    """A class name. Raises UserError for what is no text or a damaged one."""
    if not isinstance(value, (str, int)) or isinstance(value, bool):
        raise UserError(f"{where}: the label is {str(value)[:50]!r}, not a text")
    fault = text_fault(str(value))
    if fault is not None:
        raise UserError(f"{where}: in the label, {fault}")
    return clean_sentence(str(value))


def numbers(value: Any, count: int | None, what: str, where: str) -> list[float]:
    """Finite numbers, `count` of them unless None. Raises UserError."""
    try:
        found = [float(entry) for entry in value]
        fits = all(map(math.isfinite, found)) and (count is None or len(found) == count)
    except (TypeError, ValueError, OverflowError):
        fits = False
    if not fits:
        wanted = "numbers" if count is None else f"{count} numbers"
        raise UserError(f"{where}: {what} is {str(value)[:60]!r}, not {wanted}")
    return found


def point_pairs(value: Any, where: str) -> list[float]:
    """[[x, y], ...] as [x, y, x, y, ...]. Raises UserError."""
    if not isinstance(value, list):
        raise UserError(f"{where}: the points are {str(value)[:60]!r}, not a list")
    return [number for point in value for number in numbers(point, 2, "a point", where)]


def stated_size(height: Any, width: Any, where: str) -> Size:
    """Height and width that a tool states. Raises UserError."""
    try:
        size = (int(height), int(width))
    except (TypeError, ValueError, OverflowError):
        size = (0, 0)
    if min(size) < 1 or size[0] * size[1] > MAX_PIXELS:
        raise UserError(f"{where}: the picture's height {height!r} and width {width!r} are not a size in pixels")
    return size


def rectangle(x0: float, y0: float, x1: float, y1: float, turn: float = 0.0) -> list[float]:
    """The polygon of a rectangle by two opposite corners, turned by degrees clockwise around its centre."""
    x0, x1, y0, y1 = min(x0, x1), max(x0, x1), min(y0, y1), max(y0, y1)
    corners = [x0, y0, x1, y0, x1, y1, x0, y1]
    return turned(corners, ((x0 + x1) / 2, (y0 + y1) / 2), turn)


def ellipse(x: float, y: float, radius_x: float, radius_y: float, turn: float = 0.0) -> list[float]:
    """The polygon of an ellipse of 72 corners, turned by degrees clockwise."""
    angles = np.linspace(0, 2 * math.pi, 72, endpoint=False)
    flat = np.stack([x + radius_x * np.cos(angles), y + radius_y * np.sin(angles)], 1).reshape(-1).tolist()
    return turned(flat, (x, y), turn)


def turned(polygon: Sequence[float], centre: tuple[float, float], degrees: float) -> list[float]:
    """A polygon turned clockwise (y is down) around a centre."""
    if not degrees:
        return list(polygon)
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    points = [(polygon[i] - centre[0], polygon[i + 1] - centre[1]) for i in range(0, len(polygon), 2)]
    return [c for x, y in points for c in (centre[0] + x * cos - y * sin, centre[1] + x * sin + y * cos)]


def placed(crop: NDArray[np.uint8], left: int, top: int, size: Size, where: str) -> dict[str, Any]:
    """Run lengths of a mask of `size` that has `crop` at a place, cut where it leaves the picture. Raises UserError."""
    whole = np.zeros(size, np.uint8)
    height, width = crop.shape
    up, start = max(top, 0), max(left, 0)
    down, end = min(top + height, size[0]), min(left + width, size[1])
    if up >= down or start >= end:
        raise UserError(f"{where}: the mask at {left}, {top} lies outside the picture of {size[1]} x {size[0]}")
    whole[up:down, start:end] = crop[up - top : down - top, start - left : end - left]
    return encode_mask(whole)


def joined(parts: Sequence[Any], size: Size) -> Any:
    """Parts of one object (flat polygons or run lengths) as one segmentation of `size`."""
    if all(isinstance(part, list) for part in parts):
        return list(parts)
    if len(parts) == 1:
        return parts[0]
    masks = [decode_mask(part if isinstance(part, dict) else referent_mask([[part]], *size).union) for part in parts]
    return encode_mask(np.bitwise_or.reduce(masks))


def find_picture(finder: PictureFinder, name: str, where: str) -> str:
    """The picture that a tool's file names, below the finder's folder. Raises UserError that names the flag."""
    found = finder.find(name)
    if found is None:
        raise UserError(
            f"{where}: the picture {name[:200]!r} is not below {finder.root}, or several are called so; give --images, "
            f"the folder with the pictures"
        )
    return found


def split_of_path(path: str, splits: Iterable[str]) -> str | None:
    """The first folder of a path that is one of the splits' names."""
    known = set(splits)
    return next((part for part in path.split("/")[:-1] if part.casefold() in known), None)


SPLIT_FOLDERS = ("train", "training", "val", "valid", "validation", "dev", "test", "testing")
