"""What is annotated of a referent besides its mask: its box, and its objects one by one.

The box of a sample's referent at the network's size: the annotated one, or the one around its mask.

This file decides which. The annotated box counts where a row has one and the mask is the annotated one: scaled, cut or
mirrored, but not replaced. Everywhere else the box is the one around the mask, and a run says so at its start.
"""

from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from amltrain.data.augment import Corners
from amltrain.matching import boxes_of_masks


def annotated_corners(referent: dict[str, Any]) -> Corners | None:
    """Corners (x1, y1, x2, y2) in pixels of a row's image; None without a target, or without a box of some area."""
    box = [float(value) for value in referent["bbox"] or []]
    if referent["no_target"] or len(box) != 4 or min(box[2:]) <= 0:
        return None
    x, y, width, height = box
    return (x, y, x + width, y + height)


def parts_of(referent: dict[str, Any], referents: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The referents of a picture that are a referent's objects one by one; [] where one of them is not there.

    Prepared rows hold a mask for each referent. A sentence of gRefCOCO that means several objects has their union; the
    objects are those that other sentences of the picture mean alone.
    """
    alone = {one["ann_ids"][0]: one for one in referents if len(one["ann_ids"]) == 1 and not one["no_target"]}
    parts = [alone.get(number) for number in referent["ann_ids"]]
    return [part for part in parts if part is not None] if len(parts) > 1 and None not in parts else []


def network_box(corners: Corners | None, target: Tensor, geometry: Tensor) -> Tensor:
    """The referent's box, [4] float32 corners in pixels of the network's input; zeros where there is no referent.

    corners: annotated, in pixels of the picture that `geometry` is of; None = there are none. target: [H, W] uint8 as
    in `records.Batch`. What lies outside the picture is cut off; a box with nothing left is replaced as one that
    is missing.
    """
    if corners is not None:
        height, width, scale_y, scale_x, offset_y, offset_x = geometry.tolist()
        x1, x2 = (min(max(x, 0.0), width) * scale_x + offset_x for x in corners[::2])
        y1, y2 = (min(max(y, 0.0), height) * scale_y + offset_y for y in corners[1::2])
        if x1 < x2 and y1 < y2:
            return torch.tensor([x1, y1, x2, y2], dtype=torch.float32)
    return boxes_of_masks(target[None] >= 128)[0]


def without_box(referents: pa.Array) -> int:
    """How many referents with a target have no annotated box. referents: the structs of prepared rows."""
    boxes = pc.fill_null(pc.list_value_length(pc.struct_field(referents, "bbox")), 0)
    missing = pc.and_(pc.not_equal(boxes, 4), pc.invert(pc.struct_field(referents, "no_target")))
    return pc.sum(missing).as_py() or 0
