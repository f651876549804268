"""Where things are: sine codes of map positions and the cells' own centres."""

import math

import torch
from torch import Tensor


def sine_position(height: int, width: int, dim: int, *, device: torch.device | None = None) -> Tensor:
    """DETR's normalised 2-D sine code, [height * width, dim] float32: first half rows, second half columns.

    Coordinates 1..n are scaled to (0, 2 pi]; feature pairs 2k, 2k + 1 are sine and cosine at frequency
    10000^(-4k / dim). Source: Carion et al., DETR, ECCV 2020; Cheng et al., Mask2Former, CVPR 2022.
    """
    half = dim // 2
    pairs = torch.arange(half, device=device, dtype=torch.float32) // 2
    period = 10000 ** (2 * pairs / half)

    def axis(count: int) -> Tensor:
        steps = torch.arange(1, count + 1, device=device, dtype=torch.float32)
        angle = (steps / (count + 1e-6) * 2 * math.pi)[:, None] / period
        return torch.stack((angle[:, 0::2].sin(), angle[:, 1::2].cos()), dim=-1).flatten(1)  # [count, half]

    rows = axis(height)[:, None].expand(height, width, half)
    columns = axis(width)[None].expand(height, width, half)
    return torch.cat((rows, columns), dim=-1).flatten(0, 1)


def cell_centres(height: int, width: int, *, device: torch.device | None = None) -> Tensor:
    """Centre (x, y) of every cell in units of the map, in row-major order: [height * width, 2] float32 in (0, 1)."""
    y = (torch.arange(height, device=device, dtype=torch.float32) + 0.5) / height
    x = (torch.arange(width, device=device, dtype=torch.float32) + 0.5) / width
    grid = torch.meshgrid(y, x, indexing="ij")
    return torch.stack((grid[1], grid[0]), dim=-1).flatten(0, 1)
