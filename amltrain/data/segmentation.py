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

    No segmentation at all gives an empty mask (a sentence without target). Broken polygons are dropped as long as one
    is left (ReLA's rule); raises BrokenSegmentationError when none is.
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
    faults = [_fault(polygon) for polygon in segmentation]
    usable = [polygon for polygon, fault in zip(segmentation, faults, strict=True) if fault is None]
    return coco.frPyObjects(usable, height, width) if usable else [], [fault for fault in faults if fault]


def _fault(polygon: Any) -> str | None:
    """What is wrong with a polygon, None if nothing is."""
    if not isinstance(polygon, list) or len(polygon) < 6:
        return "a polygon has fewer than 3 points"  # pycocotools would read four numbers as a box
    if len(polygon) % 2:
        return "a polygon has an odd number of coordinates"
    try:
        finite = bool(np.isfinite(np.asarray(polygon, dtype=np.float64)).all())
    except (TypeError, ValueError):
        finite = False
    return None if finite else "a polygon has a coordinate that is no finite number"


def _run_lengths(rle: dict[str, Any], height: int, width: int) -> Rle:
    if list(rle.get("size", [])) != [height, width]:
        raise BrokenSegmentationError(f"its run lengths are for size {rle.get('size')}, the image is {[height, width]}")
    counts = rle.get("counts")
    if isinstance(counts, list):
        if sum(counts) != height * width:
            raise BrokenSegmentationError("its run lengths do not add up to the image")
        return coco.frPyObjects(rle, height, width)
    if isinstance(counts, (str, bytes)):
        return {"size": [height, width], "counts": counts.encode() if isinstance(counts, str) else counts}
    raise BrokenSegmentationError("its run lengths have no counts")
