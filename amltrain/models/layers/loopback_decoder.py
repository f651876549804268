"""DeRIS' predictor: queries read the image where their masks lie, and after every prediction the sentence.

Paper: Dai et al., DeRIS, ICCV 2025. Masked attention is Mask2Former's; the "loopback" between its layers is DeRIS' own.

Dimensions: B batch, Q queries, C width, L text tokens, h w the map of stride 4, N positions of one scale.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from amltrain.models.layers.basic import ModuleListOf, sine_position
from amltrain.models.layers.query_reader import MLP, collapsed_code
from amltrain.models.layers.region_decoder import FeedForward, ResidualAttention, open_empty_rows

Mixing = Literal["batch", "queries", "alone"]
"""Among what a query looks in the loopback. batch: the same query of all samples of the batch, as released, so that a
sample's result depends on its neighbours; queries: the other queries of its sample, as meant; alone: itself only, what
the released weights do with a batch of one."""


class Prediction(NamedTuple):
    """masks [B, Q, h, w] logits at stride 4, refer [B, Q, 2] logits (referred to, not)."""

    masks: Tensor
    refer: Tensor


class QueryMixing(ResidualAttention):
    """Queries look at each other, told apart by what their masks cover."""

    def __init__(self, dim: int, heads: int, mixing: Mixing) -> None:
        super().__init__(dim, heads)
        self.mixing = mixing

    def forward(self, x: Tensor, pooled: Tensor) -> Tensor:  # type: ignore[override]  # key and query are made here
        """x, pooled [B, Q, C] -> [B, Q, C]."""
        placed = x + pooled
        if self.mixing == "queries":
            read, _ = self.attention(placed, placed, x, need_weights=False)
        elif self.mixing == "batch":
            placed, value = placed.transpose(0, 1), x.transpose(0, 1)
            read, _ = self.attention(placed, placed, value, need_weights=False)
            read = read.transpose(0, 1)
        else:
            single = (-1, 1, x.shape[-1])
            placed, value = placed.reshape(single), x.reshape(single)
            read, _ = self.attention(placed, placed, value, need_weights=False)
            read = read.reshape(x.shape)
        return self.norm(x + read)


class WordAttention(nn.Module):
    """Attention to words, of which padded ones are only discouraged: 100 is subtracted, as in the official code."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.proj = (nn.Linear(dim, dim) for _ in range(4))

    def forward(self, x: Tensor, key: Tensor, value: Tensor, padding: Tensor) -> Tensor:
        """X [B, Q, C], key, value [B, L, C], padding [B, L] bool (True = padded) -> [B, Q, C]."""
        q, k, v = (
            project(given).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for project, given in ((self.q, x), (self.k, key), (self.v, value))
        )
        mask = padding.to(q.dtype)[:, None, None] * -100.0
        return self.proj(F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2))


class TextReading(nn.Module):
    """Queries look at each other, at the words, and pass a feed-forward network; post-norm."""

    def __init__(self, dim: int, feedforward: int, heads: int = 8) -> None:
        super().__init__()
        self.self_attn = nn.MultiheadAttention(dim, heads, batch_first=True)
        self.cross_attn = WordAttention(dim, heads)
        self.linear1, self.linear2 = nn.Linear(dim, feedforward), nn.Linear(feedforward, dim)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(dim) for _ in range(3))

    def forward(self, x: Tensor, text: Tensor, position: Tensor, padding: Tensor) -> Tensor:
        """X [B, Q, C], text [B, L, C], position [L, C], padding [B, L] bool -> [B, Q, C]."""
        read, _ = self.self_attn(x, x, x, need_weights=False)
        x = self.norm2(x + read)
        x = self.norm1(x + self.cross_attn(x, text + position, text, padding))
        return self.norm3(x + self.linear2(F.relu(self.linear1(x))))


class Loopback(nn.Module):
    """What a query's mask covers and what the words say come back into the query."""

    def __init__(self, dim: int, heads: int, feedforward: int, mixing: Mixing) -> None:
        super().__init__()
        self.mix = QueryMixing(dim, heads, mixing)
        self.words = TextReading(dim, feedforward)
        self.join = nn.Linear(2 * dim, dim)

    def forward(
        self, x: Tensor, masks: Tensor, small: Tensor, text: Tensor, position: Tensor, padding: Tensor
    ) -> tuple[Tensor, Tensor]:
        """X [B, Q, C], masks [B, Q, h, w], small [B, C, h/4, w/4] mask features, words as in `TextReading` ->
        next queries [B, Q, C], what the words said [B, Q, C].
        """
        weight = F.interpolate(masks, small.shape[-2:], mode="bilinear", align_corners=False).sigmoid()
        pooled = torch.einsum("bqhw,bchw->bqc", weight, small) / (small.shape[-2] * small.shape[-1])
        mixed = self.mix(x, pooled)
        read = self.words(mixed, text, position, padding)
        return self.join(torch.cat([mixed, read], dim=-1)), read


class LoopbackDecoder(nn.Module):
    """Three masked-attention layers with a prediction and a loopback before, between and after them."""

    def __init__(
        self,
        *,
        dim: int = 256,
        queries: int = 20,
        layers: int = 3,
        heads: int = 8,
        feedforward: int = 2048,
        mixing: Mixing = "batch",
    ) -> None:
        """layers: one per scale of the image, in turn."""
        super().__init__()
        self.query_embed, self.level_embed = nn.Embedding(queries, dim), nn.Embedding(3, dim)
        self.read_image = ModuleListOf(ResidualAttention(dim, heads) for _ in range(layers))
        self.read_queries = ModuleListOf(ResidualAttention(dim, heads) for _ in range(layers))
        self.feedforward = ModuleListOf(FeedForward(dim, feedforward) for _ in range(layers))
        self.loops = ModuleListOf(Loopback(dim, heads, feedforward, mixing) for _ in range(layers + 1))
        self.norm = nn.LayerNorm(dim)
        self.mask_embed = MLP(dim, dim, dim, dim)
        self.fuse = nn.Conv2d(2 * dim, dim, 1)
        self.refer = nn.Linear(dim, 2)
        for name, matrix in self.named_parameters():
            if matrix.ndim == 2 and ("attention.in_proj" in name):
                nn.init.xavier_uniform_(matrix)

    def forward(
        self,
        queries: Tensor,
        mask_features: Tensor,
        scales: Sequence[Tensor],
        image: Tensor,
        text: Tensor,
        text_mask: Tensor,
    ) -> tuple[Tensor, list[Prediction]]:
        """Queries [B, Q, C]; mask_features [B, C, h, w] at stride 4; scales [B, C, h_i, w_i] at strides 32, 16, 8;
        image [B, C, h', w'] and text [B, L, C] of the cognition branch; text_mask [B, L] bool.

        Returns the last queries and one prediction per loopback.
        """
        image = F.interpolate(image, mask_features.shape[-2:], mode="bilinear", align_corners=False)
        pixels = self.fuse(torch.cat([mask_features, image.to(mask_features.dtype)], dim=1))
        small = F.avg_pool2d(pixels, 4)
        words = (text, collapsed_code(*text.shape[1:], device=text.device).to(text.dtype), ~text_mask)
        x = queries
        predictions: list[Prediction] = []
        for step, loop in enumerate(self.loops):
            if step > 0:
                x = self._layer(step - 1, x, scales[(step - 1) % len(scales)], predictions[-1].masks)
            masks = torch.einsum("bqc,bchw->bqhw", self.mask_embed(self.norm(x)), pixels)
            x, read = loop(x, masks, small, *words)
            predictions.append(Prediction(masks, self.refer(read)))
        return x, predictions

    def _layer(self, layer: int, x: Tensor, scale: Tensor, masks: Tensor) -> Tensor:
        """One masked-attention layer over a scale [B, C, h_i, w_i]; masks of the prediction before it."""
        height, width = scale.shape[-2:]
        value = scale.flatten(2).transpose(1, 2) + self.level_embed.weight[layer % self.level_embed.num_embeddings]
        code = sine_position(height, width, x.shape[-1], device=x.device).to(value.dtype)
        blocked = F.interpolate(masks.detach(), (height, width), mode="bilinear", align_corners=False) < 0
        place = self.query_embed.weight
        x = self.read_image[layer](x, x + place, value + code, value, open_empty_rows(blocked.flatten(2), None))
        x = self.read_queries[layer](x, x + place, x + place, x)
        return self.feedforward[layer](x)
