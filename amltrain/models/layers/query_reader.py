"""Post-norm transformer layers of DETR's kind, whose queries read a memory, and the codes of positions they use.

C3VG and DeRIS build their heads from them. Keys of the official layers (mmcv's) are renamed by `OFFICIAL_READER_NAMES`.

Dimensions: B batch, Q queries, N tokens of the memory, C channels.
"""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from amltrain.models.layers.basic import ModuleListOf

OFFICIAL_READER_NAMES = [
    (r"\.attentions\.0\.attn\.", ".self_attention."),
    (r"\.attentions\.1\.attn\.", ".reading."),
    (r"\.ffns\.0\.layers\.0\.0\.", ".linear1."),
    (r"\.ffns\.0\.layers\.1\.", ".linear2."),
    (r"\.post_norm_layer\.", ".norm."),
]
"""mmcv's key names to ours, as rules for `re.sub`; `layers.i` and `norms.i` are the same."""


def collapsed_code(length: int, dim: int, *, device: torch.device | None = None) -> Tensor:
    """A sine code of positions whose frequencies were cut to integers: [length, dim] float32.

    Only the first pair of columns is left, sin n and cos n; every other even column is 0, every other odd one 1. The
    released weights of C3VG and DeRIS were trained with it.
    """
    steps = torch.arange(length, device=device, dtype=torch.float32)
    code = torch.arange(dim, device=device).remainder(2).float().expand(length, dim)
    return torch.cat([steps.sin()[:, None], steps.cos()[:, None], code[:, 2:]], dim=1)


class ReaderLayer(nn.Module):
    """Self-attention, attention to a memory if there is one (`reads`), and a feed-forward network."""

    def __init__(self, dim: int, heads: int, feedforward: int, dropout: float, reads: bool = True) -> None:
        """dropout: on attention weights, after the ReLU and at the end of the feed-forward network."""
        super().__init__()
        self.self_attention = nn.MultiheadAttention(dim, heads, dropout=dropout, batch_first=True)
        self.reading = nn.MultiheadAttention(dim, heads, dropout=dropout, batch_first=True) if reads else None
        self.linear1, self.linear2 = nn.Linear(dim, feedforward), nn.Linear(feedforward, dim)
        self.dropout = nn.Dropout(dropout)
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(3 if reads else 2))

    def forward(
        self,
        x: Tensor,
        memory: Tensor,
        position: Tensor | None,
        memory_position: Tensor | None,
        padding: Tensor | None,
    ) -> Tensor:
        """X [B, Q, C]; memory [B, N, C]; positions that broadcast to them; padding [B, N] bool (True = not read)."""
        placed = x if position is None else x + position
        read, _ = self.self_attention(placed, placed, x, need_weights=False)
        x = self.norms[0](x + read)
        if self.reading is not None:
            query = x if position is None else x + position
            key = memory if memory_position is None else memory + memory_position
            read, _ = self.reading(query, key, memory, key_padding_mask=padding, need_weights=False)
            x = self.norms[1](x + read)
        return self.norms[-1](x + self.dropout(self.linear2(self.dropout(F.relu(self.linear1(x))))))


class Reader(nn.Module):
    """Layers in which queries read a memory, and a last norm."""

    def __init__(self, dim: int, heads: int, feedforward: int, layers: int, dropout: float) -> None:
        super().__init__()
        self.layers = ModuleListOf(ReaderLayer(dim, heads, feedforward, dropout) for _ in range(layers))
        self.norm = nn.LayerNorm(dim)

    def forward(
        self,
        x: Tensor,
        memory: Tensor,
        *,
        position: Tensor | None = None,
        memory_position: Tensor | None = None,
        padding: Tensor | None = None,
    ) -> Tensor:
        """As `ReaderLayer`."""
        for layer in self.layers:
            x = layer(x, memory, position, memory_position, padding)
        return self.norm(x)


class SelfReader(nn.Module):
    """Layers of tokens that read each other, without a last norm."""

    def __init__(self, dim: int, heads: int, feedforward: int, layers: int, dropout: float) -> None:
        super().__init__()
        self.layers = ModuleListOf(ReaderLayer(dim, heads, feedforward, dropout, reads=False) for _ in range(layers))

    def forward(self, x: Tensor, position: Tensor) -> Tensor:
        """X [B, N, C], position [N, C] -> [B, N, C]."""
        for layer in self.layers:
            x = layer(x, x, position, None, None)
        return x


class MLP(nn.Module):
    """Linear layers with a ReLU between them; `widths` are those of the input, in between, and of the output."""

    def __init__(self, *widths: int) -> None:
        super().__init__()
        self.layers = ModuleListOf(nn.Linear(width, following) for width, following in pairwise(widths))

    def forward(self, x: Tensor) -> Tensor:
        """X [..., widths[0]] -> [..., widths[-1]]."""
        for layer in self.layers[:-1]:
            x = F.relu(layer(x))
        return self.layers[-1](x)
