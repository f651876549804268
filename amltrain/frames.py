"""Frames of pictures that data, models and losses share: how a network input is normalised, and the resize `longest`.

`longest` keeps the aspect ratio: the longest side becomes the side S of the network's input, the picture lies in the
upper left corner, and the rest is padding (SAM, GSVA). A second encoder may read another frame, `Batch.view`.
"""

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

MEAN_STD: dict[str, tuple[tuple[float, float, float], tuple[float, float, float]]] = {
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "clip": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
    "half": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
}
"""Mean and standard deviation of the channels, of pixels in 0..1, by the name of the normalization."""


Normalization = Literal["imagenet", "clip", "half"]

VIEW_NORMALIZATION: Normalization = "clip"
"""Of `Batch.view`, whatever the model; one whose second encoder was trained with another changes it."""


def renormalised(image: Tensor, own: Normalization, wanted: Normalization) -> Tensor:
    """An image [B, 3, H, W] normalised by the statistics of one name, normalised by those of another."""
    changes = zip(*MEAN_STD[own], *MEAN_STD[wanted], strict=True)
    scaled = [image[:, i] * (std / to) + (mean - centre) / to for i, (mean, std, centre, to) in enumerate(changes)]
    return torch.stack(scaled, dim=1)


def longest_side(height: int, width: int, size: float) -> tuple[int, int]:
    """Height and width of an image whose longest side becomes `size` pixels, rounded half up as SAM does."""
    scale = size / max(height, width)
    return int(height * scale + 0.5), int(width * scale + 0.5)


def inside_longest(geometry: Tensor, size: int) -> Tensor:
    """Where a network input of `size` pixels shows the picture and not its padding, [B, size, size] bool.

    geometry: [B, 6] of a resize without offset, see `records.Batch`.
    """
    steps = torch.arange(size, device=geometry.device)
    rows, columns = ((geometry[:, i] * geometry[:, 2 + i]).round() for i in range(2))
    return (steps < rows[:, None])[:, :, None] & (steps < columns[:, None])[:, None, :]


def from_longest(values: Tensor, size: Sequence[int]) -> Tensor:
    """Bring maps [..., S, S] of a network input of resize `longest` back to the picture's size (h0, w0).

    The padding is cut off, then they are resized bilinearly by pixels' centres, as SAM does.
    """
    rows, columns = longest_side(size[0], size[1], values.shape[-1])
    maps = values[..., :rows, :columns].reshape(1, -1, rows, columns)
    resized = F.interpolate(maps, tuple(size), mode="bilinear", align_corners=False)
    return resized.reshape(*values.shape[:-2], *size)


def at_view(values: Tensor, geometry: Tensor, view_geometry: Tensor, size: int) -> Tensor:
    """What a map of the network input says at every pixel of `Batch.view`, by nearest neighbour.

    values: [B, H, W]; geometry, view_geometry: [B, 6] of the network input and of the view. Returns [B, size, size];
    nothing waits for the device.
    """
    centres = torch.arange(size, device=values.device, dtype=geometry.dtype) + 0.5
    place = (centres - view_geometry[:, 4:6, None]) / view_geometry[:, 2:4, None]  # [B, 2, size] in the picture
    place = place * geometry[:, 2:4, None] + geometry[:, 4:6, None]
    limits = (values.shape[-2] - 1, values.shape[-1] - 1)
    rows, columns = (place[:, axis].floor().clamp(0, limits[axis]).long() for axis in (0, 1))
    each = torch.arange(len(values), device=values.device)
    return values[each[:, None, None], rows[:, :, None], columns[:, None, :]]
