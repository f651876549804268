"""Polygons and run lengths of COCO annotations -> one compressed RLE per referent."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from pycocotools import mask as coco

Rle = dict[str, Any]
"""COCO compressed run lengths: {"size": [height, width], "counts": str}."""


class BrokenSegmentationError(ValueError):
    """A segmentation that describes no region; the message says why."""


class ReferentMask(NamedTuple):
    """union: every part is foreground. exclusive: pixels of exactly one part (LAVT's rule); None where they agree.

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
    if not segmentations:
        return ReferentMask(_text(_encode(np.zeros((height, width), np.uint8))), None)
    parts: list[Rle] = []
    dropped: list[str] = []
    for segmentation in segmentations:
        found, broken = _parts(segmentation, height, width)
        parts += found
        dropped += broken
    if not parts:
        raise BrokenSegmentationError(dropped[0])
    union = coco.merge(parts)
    if not coco.area(union):
        raise BrokenSegmentationError("it covers no pixel")
    if len(parts) == 1 or coco.area(union) == sum(coco.area(part) for part in parts):
        return ReferentMask(_text(union), None, tuple(dropped))
    covered = coco.decode(parts).sum(axis=2)
    return ReferentMask(_text(union), _text(_encode((covered == 1).astype(np.uint8))), tuple(dropped))


def decode_rle(rle: Rle) -> np.ndarray:
    """[height, width] uint8, 0 or 1."""
    return coco.decode({"size": rle["size"], "counts": rle["counts"].encode()})


def _encode(mask: np.ndarray) -> Rle:
    return coco.encode(np.asfortranarray(mask))


def _text(rle: Rle) -> Rle:
    return {"size": [int(side) for side in rle["size"]], "counts": rle["counts"].decode()}


def _parts(segmentation: Any, height: int, width: int) -> tuple[list[Rle], list[str]]:
    """Run lengths of every usable part, and why the others are not."""
    if isinstance(segmentation, dict):
        return [_run_lengths(segmentation, height, width)], []
    if not isinstance(segmentation, list) or not segmentation:
        return [], ["it has no polygon and no run lengths"]
    if isinstance(segmentation[0], dict):
        return [_run_lengths(part, height, width) for part in segmentation], []
    faults = [_fault(polygon, height, width) for polygon in segmentation]
    usable = [polygon for polygon, fault in zip(segmentation, faults, strict=True) if fault is None]
    return coco.frPyObjects(usable, height, width) if usable else [], [fault for fault in faults if fault]


def _fault(polygon: Any, height: int, width: int) -> str | None:
    """What is wrong with a polygon, None if nothing is."""
    if not isinstance(polygon, list) or len(polygon) < 6:
        return "a polygon has fewer than 3 points"  # pycocotools would read four numbers as a box
    if len(polygon) % 2:
        return "a polygon has an odd number of coordinates"
    if not all(isinstance(coordinate, (int, float)) for coordinate in polygon):
        return "a polygon has a coordinate that is no number"
    try:
        points = np.asarray(polygon, dtype=np.float64).reshape(-1, 2)
    except OverflowError:  # an integer of hundreds of digits
        return "a polygon lies far outside the image"
    if not np.isfinite(points).all():
        return "a polygon has a coordinate that is no finite number"
    side = max(height, width)
    if points.min() < -side or points.max() > 2 * side:  # pycocotools' memory grows with the outline
        return "a polygon lies far outside the image"
    return None


def _run_lengths(rle: Any, height: int, width: int) -> Rle:
    if not isinstance(rle, dict):
        raise BrokenSegmentationError("it mixes run lengths and polygons")
    size = rle.get("size")
    if not isinstance(size, (list, tuple)) or list(size) != [height, width]:
        raise BrokenSegmentationError(f"its run lengths are for size {size}, the image is {[height, width]}")
    counts = rle.get("counts")
    if isinstance(counts, bytes):
        counts = counts.decode("ascii", errors="replace")
    runs = _runs_of_text(counts) if isinstance(counts, str) else counts
    if not isinstance(runs, list):
        raise BrokenSegmentationError("its run lengths have no counts")
    # pycocotools reads outside its memory where counts do not fit
    if not all(isinstance(run, int) and run >= 0 for run in runs) or sum(runs) != height * width:
        raise BrokenSegmentationError("its run lengths do not add up to the image")
    return coco.frPyObjects({"size": [height, width], "counts": runs}, height, width)


def _runs_of_text(text: str) -> list[int]:
    """COCO's compressed counts: groups of 5 bits in characters from "0" on, bit 5 says that the number goes on; from
    the fourth number on, the difference to the last but one."""
    runs: list[int] = []
    value = shift = 0
    for letter in text:
        bits = ord(letter) - 48
        if not 0 <= bits < 64:
            raise BrokenSegmentationError("its run lengths hold a character that cannot be in them")
        value |= (bits & 31) << shift
        shift += 5
        if bits & 32:
            continue
        value -= (bits & 16) << (shift - 4)  # the sign
        runs.append(value + (runs[-2] if len(runs) > 2 else 0))
        value = shift = 0
    if shift:
        raise BrokenSegmentationError("its run lengths end in the middle of a number")
    return runs
