"""Multi-scale deformable attention: every query reads a few learned places around it on every level.

Paper: Zhu et al., Deformable DETR, ICLR 2021. transformers' module is not used because it waits for the device in
training (a check for infinities) and because its arguments change between versions; its sampling function keeps the
samples of all levels until the end, where summing level by level needs less memory and time.

Dimensions: B batch, Q queries, N positions of all levels together, C width, P points.

On a GPU, Deformable DETR's own operators can be used instead, compiled, from the Hub (Apache 2.0): see `hub_kernels`.

Mask2Former's pixel decoder: a deformable encoder over strides 32, 16 and 8, and one pyramid step to stride 4.

Paper: Cheng et al., Masked-attention Mask Transformer for Universal Image Segmentation, CVPR 2022. The same function as
transformers' Mask2FormerPixelDecoder, which is not used because it waits for the device in every training step.

Dimensions: B batch, C width, M width of the mask features, N positions of the three levels together.
"""

import math
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from amltrain.models.layers.basic import ModuleListOf, cell_centres, sine_position
from amltrain.models.layers.hub_kernels import HubKernel, equal_or_none, is_asked, load

KERNEL = HubKernel("kernels-community/deformable-detr", version=1)

Sample = Callable[[Tensor, list[tuple[int, int]], Tensor, Tensor], Tensor]
"""Arguments and result of `sample_levels`."""


@cache
def find_kernel(device: torch.device, plain: Sample) -> Sample | None:
    """Return the kernel for a CUDA device; None where it is not asked for, cannot be loaded or is not equal."""
    if not is_asked(device):
        return None
    return equal_or_none(
        KERNEL.repository, lambda: sampler(load(KERNEL)), lambda sample: largest_difference(sample, plain, device)
    )


def sampler(operators: Any) -> Sample:
    """Wrap the kernel's two operators. operators: with `ms_deform_attn_forward` and `ms_deform_attn_backward`."""

    class Operators(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, values: Tensor, sizes: Tensor, starts: Tensor, places: Tensor, weights: Tensor) -> Tensor:
            inputs = (values, sizes, starts, places, weights)
            ctx.save_for_backward(*inputs)
            return operators.ms_deform_attn_forward(*inputs, values.shape[0])

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
            inputs = ctx.saved_tensors
            batch = inputs[0].shape[0]
            found = operators.ms_deform_attn_backward(*inputs, gradients[0].contiguous(), batch)
            return found[0], None, None, found[1], found[2]

    def sample(values: Tensor, shapes: list[tuple[int, int]], places: Tensor, weights: Tensor) -> Tensor:
        sizes, starts = _layout(tuple(shapes), values.device)
        return Operators.apply(values.contiguous(), sizes, starts, places.contiguous(), weights.contiguous())

    return sample


def largest_difference(one: Sample, other: Sample, device: torch.device) -> float:
    """Largest relative difference of outputs and gradients on random inputs, some of which lie outside of the maps."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(5, 7), (3, 4), (2, 2)]
    count = sum(height * width for height, width in shapes)
    drawn = (
        torch.randn(2, count, 4, 32, generator=generator),
        1.4 * torch.rand(2, 9, 4, 3, 4, 2, generator=generator) - 0.2,
        torch.rand(2, 9, 4, 3, 4, generator=generator),
    )
    found = []
    for function in (one, other):
        values, places, weights = (part.to(device).requires_grad_() for part in drawn)
        output = function(values, shapes, places, weights)
        found.append((output.detach(), *torch.autograd.grad(output.square().sum(), (values, places, weights))))
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(*found, strict=True))


@cache
def _layout(shapes: tuple[tuple[int, int], ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """(h, w) of every level and where it starts, int64, on the device once for all steps."""
    before = [sum(h * w for h, w in shapes[:level]) for level in range(len(shapes))]
    with torch.inference_mode(False):
        return torch.tensor(shapes, device=device), torch.tensor(before, device=device)


class MultiScaleDeformableAttention(nn.Module):
    """Deformable attention with its output projection, without residual. Always computes outside of autocast:
    places are differences of small numbers, which half precision loses.
    """

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
        """X [B, N, C], position [N, C], reference [N, 2] -> [B, N, C]."""
        x = self.norm1(x + self.self_attn(x + position, x, reference, shapes))
        return self.norm2(x + self.linear2(F.relu(self.linear1(x))))


class DeformableEncoder(nn.Module):
    """Projections of backbone maps and deformable layers over all of their positions."""

    def __init__(self, in_dims: Sequence[int], *, dim: int, layers: int, heads: int, feedforward: int) -> None:
        """in_dims: widths of the maps, coarse to fine; `dim` must be a multiple of 32 (group norm)."""
        super().__init__()
        self.input_proj = nn.ModuleList(
            nn.Sequential(nn.Conv2d(width, dim, 1), nn.GroupNorm(32, dim)) for width in in_dims
        )
        self.level_embed = nn.Parameter(torch.randn(len(in_dims), dim))
        self.layers = ModuleListOf(
            DeformableEncoderLayer(dim, feedforward, heads=heads, levels=len(in_dims)) for _ in range(layers)
        )

    def reset_parameters(self) -> None:
        for module in self.input_proj.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for layer in self.layers:
            for linear in (layer.linear1, layer.linear2):
                nn.init.xavier_uniform_(linear.weight)

    def encode(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Let all positions of all levels look at each other; maps from coarse to fine."""
        levels = [project(m) for project, m in zip(self.input_proj, maps, strict=True)]
        shapes = [(m.shape[-2], m.shape[-1]) for m in levels]
        device = levels[0].device
        x = torch.cat([m.flatten(2).transpose(1, 2) for m in levels], dim=1)
        reference = torch.cat([cell_centres(h, w, device=device) for h, w in shapes])
        position = torch.cat(
            [
                sine_position(h, w, x.shape[-1], device=device).to(x.dtype) + embed
                for (h, w), embed in zip(shapes, self.level_embed, strict=True)
            ]
        )
        for layer in self.layers:
            x = layer(x, position, reference, shapes)
        parts = x.split([h * w for h, w in shapes], dim=1)
        return [part.transpose(1, 2).unflatten(2, shape) for part, shape in zip(parts, shapes, strict=True)]


class PixelDecoder(DeformableEncoder):
    """Compute mask features and three scales from backbone maps, outside of autocast as the official code does."""

    def __init__(
        self,
        in_dims: Sequence[int],
        *,
        dim: int = 256,
        mask_dim: int = 256,
        layers: int = 6,
        heads: int = 8,
        feedforward: int = 1024,
    ) -> None:
        """in_dims: widths of the backbone maps at strides 4, 8, 16, 32; `dim` must be a multiple of 32 (group norm)."""
        finest, *coarser = in_dims
        super().__init__(coarser[::-1], dim=dim, layers=layers, heads=heads, feedforward=feedforward)
        self.lateral = nn.Sequential(nn.Conv2d(finest, dim, 1, bias=False), nn.GroupNorm(32, dim))
        self.merge = nn.Sequential(nn.Conv2d(dim, dim, 3, padding=1, bias=False), nn.GroupNorm(32, dim), nn.ReLU())
        self.mask_features = nn.Conv2d(dim, mask_dim, 1)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        super().reset_parameters()
        for module in (*self.lateral, *self.merge, self.mask_features):
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_uniform_(module.weight, a=1)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, maps: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """maps: [B, C_i, h_i, w_i] at strides 4, 8, 16, 32 -> mask features [B, M, h, w] at stride 4, and the encoded
        maps [B, C, h_i, w_i] at strides 32, 16, 8.
        """
        with torch.autocast(maps[0].device.type, enabled=False):
            finest, *coarser = (m.to(self.mask_features.weight.dtype) for m in maps)
            scales = self.encode(coarser[::-1])
            merged = self.lateral(finest)
            merged = merged + F.interpolate(scales[-1], size=merged.shape[-2:], mode="bilinear", align_corners=False)
            return self.mask_features(self.merge(merged)), scales
