"""Pixel-word attention (PWAM): every position of a visual map reads the words, as in LAVT, ReLA and CGFormer.

Paper: Yang et al., LAVT: Language-Aware Vision Transformer for Referring Image Segmentation, CVPR 2022.
The three official repositories differ in the number of heads (LAVT and ReLA 1, CGFormer 8) and in how the gate starts;
the maths is the same. The official code uses 1x1 convolutions over [B, C, N]; these are linear layers over [B, N, C],
so an official weight [out, in, 1] loses its last dimension.

Kept from the official code on purpose: scores are scaled by C**-0.5 of the whole width, however many heads there are.

Dimensions: B batch, N visual positions, L text tokens, C visual width, D text width.
"""

import torch.nn.functional as F
from torch import Tensor, nn


def instance_norm(x: Tensor) -> Tensor:
    """Normalise every channel of every sample over its positions; no affine, no running statistics. x: [B, N, C]."""
    return F.instance_norm(x.transpose(1, 2), eps=1e-5).transpose(1, 2)


class InstanceNorm(nn.Module):
    """`instance_norm` as a module."""

    def forward(self, x: Tensor) -> Tensor:
        return instance_norm(x)


class PixelWordAttention(nn.Module):
    """Multi-modal features of one visual map: its own projection times what each position read from the words."""

    def __init__(
        self, dim: int, text_dim: int, *, heads: int = 1, dropout: float = 0.0, layer_norm: bool = False
    ) -> None:
        """layer_norm: normalise queries and outputs over channels (MagNet) instead of over positions (the others)."""
        super().__init__()
        self.heads = heads
        self.visual = nn.Linear(dim, dim)
        self.query = nn.Linear(dim, dim)
        self.key = nn.Linear(text_dim, dim)
        self.value = nn.Linear(text_dim, dim)
        self.output = nn.Linear(dim, dim)
        self.project = nn.Linear(dim, dim)
        self.dropout = nn.Dropout(dropout)
        self.query_norm = nn.LayerNorm(dim) if layer_norm else InstanceNorm()
        self.output_norm = nn.LayerNorm(dim) if layer_norm else InstanceNorm()

    def forward(self, x: Tensor, text: Tensor, text_mask: Tensor) -> Tensor:
        """X [B, N, C], text [B, L, D], text_mask [B, L] bool (True = a real token) -> [B, N, C].

        N > 1 with instance norms.
        """
        visual = self.dropout(F.gelu(self.visual(x)))
        return self.dropout(F.gelu(self.project(visual * self.read(x, text, text_mask))))

    def read(self, x: Tensor, text: Tensor, text_mask: Tensor) -> Tensor:
        """Attend from every position to the words, [B, N, C]."""
        query = self._split(self.query_norm(self.query(x)))
        key, value = self.key(text), self.value(text)
        real = text_mask[..., None].to(key.dtype)
        # -1e4 and not -inf: a sentence without a real token gives zeros instead of NaN
        bias = (text_mask.to(query.dtype) - 1)[:, None, None, :] * 1e4  # [B, 1, 1, L]
        words = F.scaled_dot_product_attention(
            query, self._split(key * real), self._split(value * real), attn_mask=bias, scale=x.shape[-1] ** -0.5
        )
        return self.output_norm(self.output(words.transpose(1, 2).flatten(2)))

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # [B, heads, N or L, C / heads]


class LanguageGate(nn.Module):
    """How much of the fused map goes back into the visual trunk: x + tanh(W2 relu(W1 f)) * f, elementwise."""

    def __init__(self, dim: int, *, std: float = 0.02, gelu: bool = False) -> None:
        """std: spread of the first weights. gelu: GELU between the two matrices instead of ReLU (MagNet)."""
        super().__init__()
        self.activation = F.gelu if gelu else F.relu
        self.reduce = nn.Linear(dim, dim, bias=False)
        self.expand = nn.Linear(dim, dim, bias=False)
        for linear in (self.reduce, self.expand):
            nn.init.trunc_normal_(linear.weight, std=std) if std else nn.init.zeros_(linear.weight)

    def forward(self, x: Tensor, fused: Tensor) -> Tensor:
        """x, fused [..., C] -> [..., C]."""
        return x + self.expand(self.activation(self.reduce(fused))).tanh() * fused
