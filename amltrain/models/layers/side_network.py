"""BarLeRIa's side network: a small ViT that reads the image twice, the second time guided by the sentence.

Paper: Wang et al., BarLeRIa, ICLR 2024.

Dimensions: B batch, Q queries, L words, N patches, D width, T = Q + L + N tokens.
"""

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from timm.layers import Mlp, trunc_normal_
from torch import Tensor, nn

from amltrain.models.layers.basic import ModuleListOf

FUSED_BLOCKS = (0, 3, 6, 9)
"""After which blocks of the image tower its patches are read."""

GateNorm = Literal["batch", "channel"]


class LedAttention(nn.Module):
    """Self-attention whose values can be led by a top-down signal."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor, lead: Tensor | None) -> Tensor:
        """x, lead [B, T, D] -> [B, T, D]. The signal passes the values' weights and bias a second time."""
        query, key, value = self.qkv(x).chunk(3, dim=-1)
        if lead is not None:
            dim = x.shape[-1]
            value = value + F.linear(lead, self.qkv.weight[2 * dim :], self.qkv.bias[2 * dim :])
        query, key, value = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (query, key, value))
        return self.proj(F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2))


class LedBlock(nn.Module):
    """Pre-norm transformer block around `LedAttention`."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.attn = LedAttention(dim, heads)
        self.mlp = Mlp(dim, 4 * dim)

    def forward(self, x: Tensor, lead: Tensor | None = None) -> Tensor:
        x = x + self.attn(self.norm1(x), lead)
        return x + self.mlp(self.norm2(x))


class Feedback(nn.Module):
    """The way back through one block: the input of the block below, and the guidance of this block's second run."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.linear, self.linear2 = nn.Linear(dim, dim, bias=False), nn.Linear(dim, dim, bias=False)

    def forward(self, y: Tensor) -> tuple[Tensor, Tensor]:
        y = self.linear(y)
        return y, self.linear2(y)


class ReadTower(nn.Module):
    """Patches of the image tower, normed and projected to the side network's width."""

    def __init__(self, tower_dim: int, dim: int) -> None:
        super().__init__()
        self.norm, self.project = nn.LayerNorm(tower_dim, eps=1e-6), nn.Linear(tower_dim, dim)
        nn.init.kaiming_uniform_(self.project.weight, a=1)
        nn.init.zeros_(self.project.bias)

    def forward(self, patches: Tensor) -> Tensor:
        return self.project(self.norm(patches))


class SideNetwork(nn.Module):
    """Side ViT with queries, words and patches, its feedback chain and its readings of the image tower."""

    def __init__(
        self,
        *,
        tower_dim: int,
        text_dim: int,
        dim: int = 144,
        depth: int = 8,
        heads: int = 3,
        queries: int = 128,
        patch_size: int = 16,
        table_size: int = 26,
        hidden: int = 32,
        gate_norm: GateNorm = "batch",
    ) -> None:
        """table_size: side of the position table in patches. hidden: of the words' projection.

        gate_norm: what the words' mean is normalised over. "batch" is the official code's, in which the samples of a
        batch change each other's masks; "channel" is what a cosine needs.
        """
        super().__init__()
        self.queries, self.gate_norm = queries, gate_norm
        self.query_embed = nn.Parameter(torch.randn(1, queries, dim) * 0.02)
        self.query_pos_embed = nn.Parameter(torch.randn(1, queries, dim) * 0.02)
        self.words = nn.Sequential(nn.Linear(text_dim, hidden), nn.ReLU(), nn.Linear(hidden, dim))
        self.patch_embed = nn.Conv2d(3, dim, patch_size, stride=patch_size)
        self.pos_embed = nn.Parameter(torch.zeros(1, table_size**2, dim))
        self.blocks = nn.ModuleList(LedBlock(dim, heads) for _ in range(depth))
        self.feedback = ModuleListOf(Feedback(dim) for _ in range(depth))
        self.readings = nn.ModuleList(ReadTower(tower_dim, dim) for _ in FUSED_BLOCKS)
        trunc_normal_(self.pos_embed, std=0.02)
        for module in (*self.blocks.modules(), *self.feedback.modules()):
            if isinstance(module, nn.Linear):
                trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, image: Tensor, text: Tensor, tower: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Image [B, 3, H, W], text [B, L, W], tower: patches [B, N, V] after the blocks of `FUSED_BLOCKS`.

        Returns a map [B, D, h, w] and the feedback chain's mean squared error [B], a loss of its own.
        """
        patches = self.patch_embed(image)
        grid = (patches.shape[-2], patches.shape[-1])
        words = self.words(text)
        start = torch.cat(
            [
                (self.query_embed + self.query_pos_embed).expand(image.shape[0], -1, -1),
                words,
                patches.flatten(2).transpose(1, 2) + self._positions(grid) + self.readings[0](tower[0]),
            ],
            dim=1,
        )
        x = start
        for block in self.blocks:
            x = block(x)
        leads = self.lead(self.gate(x, words.mean(dim=1)))
        before = self.queries + words.shape[1]
        x, error = start, start.new_zeros(image.shape[0])
        for i, (block, lead) in enumerate(zip(self.blocks, leads, strict=True)):
            came = x
            x = block(x, lead)
            told = self.feedback[i].linear(x.detach())
            wrong = told - came.detach()
            error = error + wrong.to(torch.promote_types(wrong.dtype, torch.float32)).square().mean(dim=(1, 2))
            if i + 1 < len(self.readings):
                x = torch.cat([x[:, :before], x[:, before:] + self.readings[i + 1](tower[i + 1])], dim=1)
        return x[:, before:].transpose(1, 2).unflatten(2, grid), error

    def gate(self, y: Tensor, guide: Tensor) -> Tensor:
        """Keep of every token what lies along the words' mean. y [B, T, D], guide [B, D] -> [B, T, D]."""
        direction = F.normalize(guide, dim=0 if self.gate_norm == "batch" else 1, eps=1e-12)
        cosine = torch.einsum("btd,bd->bt", F.normalize(y, dim=-1, eps=1e-12), direction)
        y = y * cosine.clamp(0, 1)[..., None]
        return 5 * torch.einsum("btd,bd->bt", y, guide)[..., None] * guide[:, None]

    def lead(self, y: Tensor) -> list[Tensor]:
        """Run the feedback chain from the last block to the first; the signal of every block, first to last."""
        leads = []
        for feedback in list(self.feedback)[::-1]:
            y, lead = feedback(y)
            leads.append(lead)
        return leads[::-1]

    def _positions(self, grid: tuple[int, int]) -> Tensor:
        """The position table at a grid (h, w), [1, N, D]."""
        side = round(self.pos_embed.shape[1] ** 0.5)
        if grid == (side, side):
            return self.pos_embed
        table = self.pos_embed.transpose(1, 2).unflatten(2, (side, side)).float()
        table = F.interpolate(table, size=grid, mode="bicubic", align_corners=False)
        return table.flatten(2).transpose(1, 2).to(self.pos_embed.dtype)
