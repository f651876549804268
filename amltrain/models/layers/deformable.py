"""Multi-scale deformable attention: every query reads a few learned places around it on every level.

Paper: Zhu et al., Deformable DETR, ICLR 2021. transformers' module is not used because it waits for the device in
training (a check for infinities) and because its arguments change between versions; its sampling function keeps the
samples of all levels until the end, where summing level by level needs less memory and time.

Dimensions: B batch, Q queries, N positions of all levels together, C width, P points.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from amltrain.models.layers.deformable_kernel import Sample, find_kernel


class MultiScaleDeformableAttention(nn.Module):
    """Deformable attention with its output projection, without residual. Always computes outside of autocast:
    places are differences of small numbers, which half precision loses."""

    def __init__(self, dim: int, *, heads: int = 8, levels: int = 3, points: int = 4) -> None:
        super().__init__()
        self.heads, self.levels, self.points = heads, levels, points
        self.sampling_offsets = nn.Linear(dim, heads * levels * points * 2)
        self.attention_weights = nn.Linear(dim, heads * levels * points)
        self.value_proj = nn.Linear(dim, dim)
        self.output_proj = nn.Linear(dim, dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As published: head h starts looking in direction 2 pi h / heads, its points at distances 1, 2, ... cells."""
        angle = torch.arange(self.heads) * (2 * math.pi / self.heads)
        direction = torch.stack((angle.cos(), angle.sin()), dim=-1)
        direction = direction / direction.abs().amax(dim=-1, keepdim=True)  # [heads, 2]
        distance = torch.arange(1, self.points + 1, dtype=torch.float32)
        offsets = direction[:, None, None] * distance[:, None]  # [heads, 1, points, 2]
        nn.init.zeros_(self.sampling_offsets.weight)
        with torch.no_grad():
            self.sampling_offsets.bias.copy_(offsets.expand(-1, self.levels, -1, -1).flatten())
        nn.init.zeros_(self.attention_weights.weight)
        nn.init.zeros_(self.attention_weights.bias)
        for linear in (self.value_proj, self.output_proj):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)

    def forward(self, query: Tensor, value: Tensor, reference: Tensor, shapes: list[tuple[int, int]]) -> Tensor:
        """Return the attention output of every query, [B, Q, C].

        query      [B, Q, C], position codes included
        value      [B, N, C], the levels' positions one level after the other, N = sum of h * w
        reference  [Q, 2] float32 (x, y) in (0, 1), where a query looks from
        shapes     (h, w) of every level
        """
        dtype = self.value_proj.weight.dtype
        exact = torch.promote_types(dtype, torch.float32)
        with torch.autocast(query.device.type, enabled=False):
            query, value = query.to(dtype), value.to(dtype)
            values = self.value_proj(value).unflatten(-1, (self.heads, -1))
            offsets = self.sampling_offsets(query).unflatten(-1, (self.heads, self.levels, self.points, 2))
            weights = self.attention_weights(query).unflatten(-1, (self.heads, -1)).softmax(dim=-1)
            weights = weights.unflatten(-1, (self.levels, self.points))
            cells = offsets.to(exact) / level_sizes(shapes, query.device)[:, None]
            places = reference[:, None, None, None] + cells  # [B, Q, heads, levels, points, 2]
            read = choose_sampling(query.device)(values.to(exact), shapes, places, weights.to(exact))
            return self.output_proj(read.to(dtype))


def choose_sampling(device: torch.device) -> Sample:
    """The CUDA kernel where there is one that is equal, except in a graph, which cannot hold it."""
    if device.type != "cuda" or torch.compiler.is_compiling():
        return sample_levels
    return find_kernel(device, sample_levels) or sample_levels


def sample_levels(values: Tensor, shapes: list[tuple[int, int]], places: Tensor, weights: Tensor) -> Tensor:
    """Weighted sum of bilinear samples over points and levels, one level at a time, [B, Q, C].

    values   [B, N, heads, C / heads]
    places   [B, Q, heads, levels, P, 2], (x, y) in units of the map; what lies outside reads zero
    weights  [B, Q, heads, levels, P]
    """
    batch, heads = places.shape[0], places.shape[2]
    parts = values.split([h * w for h, w in shapes], dim=1)
    total: Tensor | None = None
    for level in reversed(range(len(shapes))):  # rounding as close as possible to the recorded official gradients
        part, shape = parts[level], shapes[level]
        maps = part.flatten(2).transpose(1, 2).reshape(batch * heads, -1, *shape)  # [B * heads, C / heads, h, w]
        # points before queries: the sum over points then runs along whole rows
        grid = (2 * places[:, :, :, level] - 1).permute(0, 2, 3, 1, 4).flatten(0, 1)  # [B * heads, P, Q, 2]
        weight = weights[:, :, :, level].permute(0, 2, 3, 1).flatten(0, 1)[:, None]  # [B * heads, 1, P, Q]
        sampled = F.grid_sample(maps, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
        read = (sampled * weight).sum(dim=2)  # [B * heads, C / heads, Q]
        total = read if total is None else total + read
    assert total is not None
    return total.unflatten(0, (batch, heads)).flatten(1, 2).transpose(1, 2)


def level_sizes(shapes: list[tuple[int, int]], device: torch.device) -> Tensor:
    """(w, h) of every level, [levels, 2] float32, written on the device: a tensor of Python numbers is waited for."""
    sides = [torch.full((1,), float(side), device=device) for h, w in shapes for side in (w, h)]
    return torch.cat(sides).unflatten(0, (-1, 2))


class DeformableEncoderLayer(nn.Module):
    """Deformable self-attention over several levels and a feed-forward network, both post-norm."""

    def __init__(self, dim: int, feedforward: int, *, heads: int = 8, levels: int = 3, points: int = 4) -> None:
        super().__init__()
        self.self_attn = MultiScaleDeformableAttention(dim, heads=heads, levels=levels, points=points)
        self.norm1 = nn.LayerNorm(dim)
        self.linear1 = nn.Linear(dim, feedforward)
        self.linear2 = nn.Linear(feedforward, dim)
        self.norm2 = nn.LayerNorm(dim)

    def forward(self, x: Tensor, position: Tensor, reference: Tensor, shapes: list[tuple[int, int]]) -> Tensor:
        """x [B, N, C], position [N, C], reference [N, 2] -> [B, N, C]."""
        x = self.norm1(x + self.self_attn(x + position, x, reference, shapes))
        return self.norm2(x + self.linear2(F.relu(self.linear1(x))))
