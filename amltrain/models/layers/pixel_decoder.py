"""Mask2Former's pixel decoder: a deformable encoder over strides 32, 16 and 8, and one pyramid step to stride 4.

Paper: Cheng et al., Masked-attention Mask Transformer for Universal Image Segmentation, CVPR 2022. The same function as
transformers' Mask2FormerPixelDecoder, which is not used because it waits for the device in every training step.

Dimensions: B batch, C width, M width of the mask features, N positions of the three levels together.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from amltrain.models.layers.deformable import DeformableEncoderLayer
from amltrain.models.layers.module_list import ModuleListOf
from amltrain.models.layers.position import cell_centres, sine_position


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
        maps [B, C, h_i, w_i] at strides 32, 16, 8."""
        with torch.autocast(maps[0].device.type, enabled=False):
            finest, *coarser = (m.to(self.mask_features.weight.dtype) for m in maps)
            scales = self.encode(coarser[::-1])
            merged = self.lateral(finest)
            merged = merged + F.interpolate(scales[-1], size=merged.shape[-2:], mode="bilinear", align_corners=False)
            return self.mask_features(self.merge(merged)), scales
