"""ReLA's predictor: region queries read the image, the words and each other, and compose the mask.

Paper: Liu et al., GRES: Generalized Referring Expression Segmentation, CVPR 2023 (arXiv 2306.00968), as re-worked on
the `main` branch of the official code (henghuiding/ReLA 3ca9551).

Kept from the official code on purpose: the words are read once, after the first layer's image attention, padded tokens
included; the minimap enters the mask as raw logits; only the last prediction is supervised.
Not kept: the region masks between the layers are dot products with mask features that are resized once per scale,
instead of full-size masks resized nine times. Resizing is linear, so the masks are the same to rounding.

Dimensions: B batch, Q regions, C width, M width of the mask features, N positions of one scale, L text tokens.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from amltrain.models.layers.basic import sine_position


class Prediction(NamedTuple):
    """masks [B, 2, h, w] logits (background, referent), minimap [B, Q, 2] logits, no_target [B, 2] logits."""

    masks: Tensor
    minimap: Tensor
    no_target: Tensor


class Level(NamedTuple):
    """One scale as the regions read it: keys and values [B, N, C], mask features [B, M, N] and, if any, suppressed
    positions [B, N] bool.
    """

    keys: Tensor
    values: Tensor
    mask_features: Tensor
    suppressed: Tensor | None


def mlp(*dims: int) -> nn.Sequential:
    """Linear layers with ReLU between."""
    layers: list[nn.Module] = []
    for before, after in pairwise(dims):
        layers += [nn.Linear(before, after), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def open_empty_rows(blocked: Tensor, suppressed: Tensor | None) -> Tensor:
    """Return the mask of each query: its blocked and the suppressed positions, but never all of them.

    blocked [B, Q, N] bool, suppressed [B, N] bool or None. A query that would be left with nothing reads all positions
    that are not suppressed; if all are, suppression is ignored.
    """
    hidden = torch.zeros_like(blocked[:, :1]) if suppressed is None else suppressed[:, None]
    hidden = hidden & ~hidden.all(dim=-1, keepdim=True)
    blocked = blocked | hidden
    nothing_left = blocked.all(dim=-1, keepdim=True)
    return (blocked & ~nothing_left) | hidden  # onnxruntime has no `where` of two bool tensors


class ResidualAttention(nn.Module):
    """LayerNorm(x + MultiheadAttention(query, key, value))."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(dim, heads, batch_first=True)
        self.norm = nn.LayerNorm(dim)
        nn.init.xavier_uniform_(self.attention.out_proj.weight)

    def forward(self, x: Tensor, query: Tensor, key: Tensor, value: Tensor, blocked: Tensor | None = None) -> Tensor:
        """x, query [B, Q, C], key, value [B, N, C], blocked [B, Q, N] bool (True = not read) -> [B, Q, C]."""
        if blocked is not None:
            blocked = blocked.repeat_interleave(self.attention.num_heads, dim=0)
        read, _ = self.attention(query, key, value, attn_mask=blocked, need_weights=False)
        return self.norm(x + read)


class FeedForward(nn.Module):
    """LayerNorm(x + W2 relu(W1 x))."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.linear1 = nn.Linear(dim, hidden)
        self.linear2 = nn.Linear(hidden, dim)
        self.norm = nn.LayerNorm(dim)
        for linear in (self.linear1, self.linear2):
            nn.init.xavier_uniform_(linear.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x + self.linear2(F.relu(self.linear1(x))))


class WordReading(nn.Module):
    """The regions read the words, scaled by a learned gate: x + 0.1 sigmoid(w) LayerNorm(x + attention(x, words))."""

    def __init__(self, dim: int, text_dim: int, heads: int) -> None:
        super().__init__()
        self.project = nn.Linear(text_dim, dim, bias=False)
        self.attend = ResidualAttention(dim, heads)
        self.weight = nn.Parameter(torch.zeros(()))
        nn.init.zeros_(self.project.weight)

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        words = self.project(text)
        return x + 0.1 * self.weight.sigmoid() * self.attend(x, x, words, words)


class RegionLayer(nn.Module):
    """One round: read the image where the region lies, the words (if this layer does), the other regions; think."""

    def __init__(self, dim: int, heads: int, feedforward: int, *, text_dim: int | None = None) -> None:
        super().__init__()
        self.read_image = ResidualAttention(dim, heads)
        self.read_words = None if text_dim is None else WordReading(dim, text_dim, heads)
        self.read_regions = ResidualAttention(dim, heads)
        self.feedforward = FeedForward(dim, feedforward)

    def forward(self, x: Tensor, place: Tensor, level: Level, outside: Tensor, text: Tensor) -> Tensor:
        """X [B, Q, C], place [Q, C], outside [B, Q, N] bool (True = not in the region), text [B, L, D] -> [B, Q, C]."""
        blocked = open_empty_rows(outside, level.suppressed)
        x = self.read_image(x, x + place, level.keys, level.values, blocked)
        if self.read_words is not None:
            x = self.read_words(x, text)
        x = self.read_regions(x, x + place, x + place, x)
        return self.feedforward(x)


class QueryDecoder(nn.Module):
    """Queries that read three scales in turn, each where its present mask lies; a subclass makes masks of them.

    Paper: Cheng et al., Mask2Former, CVPR 2022.
    """

    def __init__(
        self,
        *,
        dim: int,
        mask_dim: int,
        queries: int,
        layers: int,
        heads: int,
        feedforward: int,
        scales: int = 3,
        text_dim: int | None = None,
    ) -> None:
        """text_dim: width of the words, which the queries read once, in the first layer; None = they do not."""
        super().__init__()
        self.query_feat = nn.Parameter(torch.randn(queries, dim))
        self.query_embed = nn.Parameter(torch.randn(queries, dim))
        self.level_embed = nn.Parameter(torch.randn(scales, dim))
        self.layers = nn.ModuleList(
            RegionLayer(dim, heads, feedforward, text_dim=None if i else text_dim) for i in range(layers)
        )
        self.norm = nn.LayerNorm(dim)
        self.mask_embed = mlp(dim, dim, dim, mask_dim)

    def read(
        self, mask_features: Tensor, scales: Sequence[Tensor], text: Tensor, suppressed: Tensor | None = None
    ) -> Tensor:
        """Return the queries after the last layer, [B, Q, C].

        mask_features [B, M, h, w]; scales [B, C, h_i, w_i] from coarse to fine; text [B, L, D];
        suppressed [B, h_0, w_0] bool, positions of the coarsest scale that no query may read.
        """
        levels = [self.level(i, scale, mask_features, suppressed) for i, scale in enumerate(scales)]
        x = self.query_feat.expand(text.shape[0], -1, -1)
        for i, layer in enumerate(self.layers):
            level = levels[i % len(levels)]
            x = layer(x, self.query_embed, level, self.outside(x, level.mask_features), text)
        return x

    def level(self, index: int, scale: Tensor, mask_features: Tensor, suppressed: Tensor | None) -> Level:
        height, width = scale.shape[-2:]
        values = scale.flatten(2).transpose(1, 2) + self.level_embed[index]
        keys = values + sine_position(height, width, values.shape[-1], device=scale.device).to(values.dtype)
        features = F.interpolate(mask_features.detach(), size=(height, width), mode="bilinear", align_corners=False)
        if suppressed is not None:
            suppressed = F.interpolate(suppressed[:, None].float(), size=(height, width)).flatten(1) > 0.5
        return Level(keys, values, features.flatten(2), suppressed)

    @torch.no_grad()
    def outside(self, x: Tensor, mask_features: Tensor) -> Tensor:
        """Positions outside of every region's present mask: x [B, Q, C], features [B, M, N] -> [B, Q, N] bool."""
        return (self.mask_embed(self.norm(x)) @ mask_features).sigmoid() < 0.5


class RegionDecoder(QueryDecoder):
    """Mask features, three scales and words in; a `Prediction` out."""

    def __init__(
        self,
        *,
        dim: int = 256,
        mask_dim: int = 256,
        text_dim: int = 768,
        regions: int = 100,
        layers: int = 9,
        heads: int = 8,
        feedforward: int = 2048,
    ) -> None:
        super().__init__(
            dim=dim,
            mask_dim=mask_dim,
            queries=regions,
            layers=layers,
            heads=heads,
            feedforward=feedforward,
            text_dim=text_dim,
        )
        self.minimap = nn.Linear(dim, 2)
        self.no_target = mlp(dim, dim, 2)

    def forward(
        self, mask_features: Tensor, scales: Sequence[Tensor], text: Tensor, suppressed: Tensor | None = None
    ) -> Prediction:
        """Arguments as in `read`."""
        return self.predict(self.read(mask_features, scales, text, suppressed), mask_features)

    def predict(self, x: Tensor, mask_features: Tensor) -> Prediction:
        """The masks are sums of the regions' masks, weighted with the minimap's logits."""
        regions = self.norm(x)
        minimap = self.minimap(regions)  # [B, Q, 2]
        kernels = minimap.transpose(1, 2) @ self.mask_embed(regions)  # [B, 2, M]
        masks = torch.einsum("bam,bmhw->bahw", kernels, mask_features)
        return Prediction(masks, minimap, self.no_target(regions).mean(dim=1))
