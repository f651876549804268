"""Polygons and run lengths of COCO annotations -> one compressed RLE per referent."""

import reprlib
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as coco

from amltrain.errors import UserError

Rle = dict[str, Any]
"""COCO compressed run lengths: {"size": [height, width], "counts": str}."""
MaskParts = Literal["union", "exclusive"]


def choose_rle(referent: dict[str, Any], mask_parts: MaskParts) -> Rle:
    """Choose the run lengths of a referent's mask. exclusive: without the pixels that several polygons cover."""
    exclusive = referent["mask_exclusive"]
    if mask_parts == "exclusive" and exclusive is not None and exclusive["counts"] is not None:
        return exclusive
    return referent["mask"]


class BrokenSegmentationError(ValueError):
    """A segmentation that does not describe a region; the message has the reason."""


MAX_PIXELS = 2**28
"""No image that can be decoded has more."""
MAX_OUTLINE = 5_000_000
"""Pixels along a polygon's outline; pycocotools' memory grows with it."""
MAX_POLYGONS = 10_000


class ReferentMask(NamedTuple):
    """union: every component is foreground. exclusive: pixels of exactly one component (LAVT's rule); None where they
    agree.

    dropped: why polygons were left out, one reason each, where others remained.
    """

    union: Rle
    exclusive: Rle | None
    dropped: tuple[str, ...] = ()


def referent_mask(segmentations: Sequence[Any], height: int, width: int) -> ReferentMask:
    """Join the annotations' segmentations (polygon lists, RLE dicts, lists of RLE dicts) of one referent.

    segmentations: one for each annotation; coordinates in pixels. No segmentation at all gives an empty mask (a
    sentence without target). Broken polygons are dropped as long as one is left (ReLA's rule). Raises
    BrokenSegmentationError when none is, or when what is left covers no pixel.
    """
    if min(height, width) < 1 or height * width > MAX_PIXELS:
        raise BrokenSegmentationError(f"an image of {height} x {width} pixels cannot be")
    if not segmentations:
        return ReferentMask(_text(_encode(np.zeros((height, width), np.uint8))), None)
    components: list[Rle] = []
    dropped: list[str] = []
    for segmentation in segmentations:
        found, broken = _components(segmentation, height, width)
        components += found
        dropped += broken
    if not components:
        raise BrokenSegmentationError(dropped[0])
    union = coco.merge(components)
    if not coco.area(union):
        raise BrokenSegmentationError("it covers no pixel")
    if len(components) == 1 or coco.area(union) == sum(map(coco.area, components)):
        return ReferentMask(_text(union), None, tuple(dropped))
    covered = coco.decode(components).sum(axis=2)
    return ReferentMask(_text(union), _text(_encode((covered == 1).astype(np.uint8))), tuple(dropped))


def decode_mask(mask: Rle) -> np.ndarray:
    """A prepared mask as [height, width] uint8, 0 or 1.

    mask: {"size": [height, width], "counts": str}, as `mask` of a referent in prepared data. Checks it first. Raises
    UserError for one that does not describe a mask of its size.
    """
    try:
        height, width = (int(side) for side in mask["size"])
        return _pixels(_checked_runs(mask, height, width), height, width)
    except (KeyError, TypeError, ValueError) as error:  # BrokenSegmentationError is a ValueError
        raise UserError(f"the mask cannot be decoded: {error}") from error


def decode_rle(rle: Rle) -> np.ndarray:
    """Run lengths that this module wrote, as [height, width] uint8, 0 or 1. Foreign ones go to `decode_mask`."""
    height, width = rle["size"]
    return _pixels(_runs_of_text(rle["counts"]), height, width)


def _pixels(runs: NDArray[np.int64], height: int, width: int) -> np.ndarray:
    """Runs of 0, 1, 0, ... down the columns, as [height, width] uint8."""
    values = (np.arange(len(runs)) & 1).astype(np.uint8)
    return np.repeat(values, runs).reshape(width, height).T


def encode_mask(mask: np.ndarray) -> Rle:
    """[height, width] uint8, 0 or 1 -> compressed run lengths."""
    return _text(_encode(mask))


def area(rle: Rle) -> int:
    """Foreground pixels of run lengths that this module wrote."""
    return int(coco.area({"size": rle["size"], "counts": rle["counts"].encode()}))


def _encode(mask: np.ndarray) -> Rle:
    return coco.encode(np.asfortranarray(mask))


def _text(rle: Rle) -> Rle:
    return {"size": [int(side) for side in rle["size"]], "counts": rle["counts"].decode()}


def _components(segmentation: Any, height: int, width: int) -> tuple[list[Rle], list[str]]:
    """Run lengths of every usable component, and why the others are not."""
    if isinstance(segmentation, dict):
        return [_run_lengths(segmentation, height, width)], []
    if not isinstance(segmentation, list) or not segmentation:
        return [], ["it has no polygon and no run lengths"]
    if isinstance(segmentation[0], dict):
        return [_run_lengths(rle, height, width) for rle in segmentation], []
    if len(segmentation) > MAX_POLYGONS:
        return [], [f"it has more than {MAX_POLYGONS:,} polygons"]
    faults = [_fault(polygon, height, width) for polygon in segmentation]
    usable = [polygon for polygon, fault in zip(segmentation, faults, strict=True) if fault is None]
    return coco.frPyObjects(usable, height, width) if usable else [], [fault for fault in faults if fault]


def _fault(polygon: Any, height: int, width: int) -> str | None:
    """Return the fault of a polygon, None if it is valid."""
    if isinstance(polygon, list) and len(polygon) == 4:  # pycocotools would read them as a box
        return "a polygon has four numbers, which are two points; it needs three (a box belongs in the column `box`)"
    if not isinstance(polygon, list) or len(polygon) < 6:
        return "a polygon has fewer than 3 points"
    if len(polygon) % 2:
        return "a polygon has an odd number of coordinates"
    if not set(map(type, polygon)) <= {int, float}:
        return "a polygon has a coordinate that is not a number"
    try:
        points = np.asarray(polygon, dtype=np.float64).reshape(-1, 2)
    except OverflowError:  # an integer of hundreds of digits
        return "a polygon lies far outside the image"
    if not np.isfinite(points).all():
        return "a polygon has a coordinate that is no finite number"
    side = max(height, width)
    if points.min() < -side or points.max() > 2 * side:  # pycocotools' memory grows with the outline
        return "a polygon lies far outside the image"
    if len(points) * 2 * side > MAX_OUTLINE:  # else its outline cannot be longer
        steps = np.abs(np.diff(points, axis=0, append=points[:1])).max(axis=1)
        if steps.sum() > MAX_OUTLINE:
            return f"a polygon's outline is longer than {MAX_OUTLINE:,} pixels"
    return None


def _run_lengths(rle: Any, height: int, width: int) -> Rle:
    runs = _checked_runs(rle, height, width)
    counts = rle["counts"]
    if isinstance(counts, (str, bytes)):
        return {"size": [height, width], "counts": counts.encode() if isinstance(counts, str) else counts}
    return coco.frPyObjects({"size": [height, width], "counts": runs.tolist()}, height, width)


def _checked_runs(rle: Any, height: int, width: int) -> NDArray[np.int64]:
    """Run lengths of an image, [runs]; pycocotools would read outside its memory where they do not fit.

    Raises BrokenSegmentationError.
    """
    if not isinstance(rle, dict):
        raise BrokenSegmentationError("it mixes run lengths and polygons")
    size = rle.get("size")
    if not isinstance(size, (list, tuple)) or list(size) != [height, width]:
        raise BrokenSegmentationError(
            f"its run lengths are for size {reprlib.repr(size)}, the image is {[height, width]}"
        )
    counts = rle.get("counts")
    if isinstance(counts, bytes):
        counts = counts.decode("ascii", errors="replace")
    unfit = BrokenSegmentationError("its run lengths do not add up to the image")
    if min(height, width) < 1 or height * width > MAX_PIXELS:
        raise unfit
    if isinstance(counts, str):
        runs = _runs_of_text(counts)
    elif not isinstance(counts, list):
        raise BrokenSegmentationError("its run lengths have no counts")
    elif len(counts) > height * width + 1 or not all(type(r) is int and 0 <= r <= height * width for r in counts):
        raise unfit
    else:
        runs = np.array(counts, np.int64)
    if not len(runs) or runs.min() < 0 or runs.max() > height * width or runs.sum() != height * width:
        raise unfit
    return runs


_LONGEST_NUMBER = 30
"""Bits of a run length; none that fits an image has more."""


def _runs_of_text(text: str) -> NDArray[np.int64]:
    """COCO's compressed counts: groups of 5 bits in characters from "0" on, bit 5 marks that the number continues; from
    the fourth number on, the difference to the last but one.
    """
    try:
        codes = np.frombuffer(text.encode("ascii"), np.uint8).astype(np.int64) - 48
    except UnicodeEncodeError:
        codes = np.array([-1])
    if not len(codes) or codes.min() < 0 or codes.max() >= 64:
        raise BrokenSegmentationError("its run lengths hold a character that cannot be in them")
    ends = np.flatnonzero(codes < 32)
    if not len(ends) or ends[-1] != len(codes) - 1:
        never = len(codes) - (ends[-1] + 1 if len(ends) else 0) > _LONGEST_NUMBER // 5
        raise BrokenSegmentationError(
            "its run lengths hold a number that never ends"
            if never
            else "its run lengths end in the middle of a number"
        )
    starts = np.concatenate([[0], ends[:-1] + 1])
    lengths = ends - starts + 1
    if lengths.max() > _LONGEST_NUMBER // 5:
        raise BrokenSegmentationError("its run lengths hold a number that never ends")
    shifts = 5 * (np.arange(len(codes)) - np.repeat(starts, lengths))
    runs = np.add.reduceat((codes & 31) << shifts, starts)
    runs -= np.where(codes[ends] & 16, np.int64(1) << (5 * lengths), 0)  # the sign
    for first in (1, 2):
        runs[first::2] = np.cumsum(runs[first::2])
    return runs
