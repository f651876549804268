"""Boxes and their losses, as pure functions of tensors.

Boxes are floats. "Corners" are (x1, y1, x2, y2), "shares" are (centre x, centre y, width, height) divided by the
image's width and height. Both may be outside the image; widths and heights are at least 0.

Dimensions: B samples, H W image size.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def corners_of(shares: Tensor) -> Tensor:
    """Centre, width and height [..., 4] -> corners [..., 4] of the same unit."""
    centre, half = shares[..., :2], shares[..., 2:] / 2
    return torch.cat([centre - half, centre + half], dim=-1)


def shares_of(corners: Tensor, size: tuple[int, int]) -> Tensor:
    """Corners [..., 4] in pixels of an image of size (H, W) -> centre, width and height [..., 4] as shares of it."""
    height, width = size
    scale = corners.new_tensor([width, height, width, height])
    low, high = corners[..., :2], corners[..., 2:]
    return torch.cat([(low + high) / 2, high - low], dim=-1) / scale


def box_overlap(one: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """IoU and generalised IoU (Rezatofighi et al., CVPR 2019) of corners [..., 4], pair by pair: [...] each.

    Two boxes without any area have IoU and generalised IoU 0.
    """
    low, high = torch.maximum(one[..., :2], other[..., :2]), torch.minimum(one[..., 2:], other[..., 2:])
    both = (high - low).clamp(min=0).prod(dim=-1)
    union = _area(one) + _area(other) - both
    around = torch.cat([torch.minimum(one, other)[..., :2], torch.maximum(one, other)[..., 2:]], dim=-1)
    hull = _area(around)
    iou = both / union.where(union > 0, union.new_ones(()))
    return iou, iou - (hull - union) / hull.where(hull > 0, hull.new_ones(()))


def box_loss(predicted: Tensor, target: Tensor, l1_weight: float = 5.0, giou_weight: float = 2.0) -> Tensor:
    """l1_weight * sum of absolute differences + giou_weight * (1 - generalised IoU), per box.

    predicted, target [B, 4] shares -> [B]. Source: DETR (Carion et al., ECCV 2020).
    """
    distance = F.l1_loss(predicted, target, reduction="none").sum(dim=-1)
    _, giou = box_overlap(corners_of(predicted), corners_of(target))
    return l1_weight * distance + giou_weight * (1 - giou)


def boxes_of_masks(masks: Tensor, end: int = 1) -> Tensor:
    """The smallest box around every mask: masks [B, H, W] bool -> corners [B, 4] float32 in pixels, 0 for no mask.

    end: 1 = x2 and y2 lie just beyond the last pixel, so that one pixel has a box of one pixel; 0 = its index.
    """

    def ends(filled: Tensor) -> tuple[Tensor, Tensor]:
        """filled [B, n] bool -> first and last index, 0 where nothing is filled."""
        count = filled.shape[1]
        first = filled.byte().argmax(dim=1)
        last = count - 1 - filled.flip(1).byte().argmax(dim=1)
        return first, last

    (x1, x2), (y1, y2) = ends(masks.any(dim=1)), ends(masks.any(dim=2))
    boxes = torch.stack([x1, y1, x2 + end, y2 + end], dim=1).float()
    return boxes * masks.flatten(1).any(dim=1)[:, None]


def share_outside(masks: Tensor, corners: Tensor) -> Tensor:
    """Share of every mask that lies outside its box; 1 for an empty mask. Counting: no gradient.

    masks [B, H, W] bool, corners [B, 4] in pixels, cut to whole pixels toward 0, ends excluded -> [B] float32.
    """
    cells = corners.detach().long()
    rows = torch.arange(masks.shape[1], device=masks.device)
    columns = torch.arange(masks.shape[2], device=masks.device)
    inside_rows = (rows >= cells[:, 1:2]) & (rows < cells[:, 3:4])
    inside_columns = (columns >= cells[:, 0:1]) & (columns < cells[:, 2:3])
    inside = masks & inside_rows[:, :, None] & inside_columns[:, None, :]
    counts = masks.flatten(1).sum(dim=1).float()
    return 1 - inside.flatten(1).sum(dim=1).float() / counts.clamp(min=1)


def _area(corners: Tensor) -> Tensor:
    return (corners[..., 2:] - corners[..., :2]).prod(dim=-1)
