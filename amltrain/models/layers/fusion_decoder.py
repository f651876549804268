"""CARIS's decoder: text and pixels read each other over three levels, and the text becomes the mask head's weights.

Dimensions: B batch, L text tokens, P prompts, V visual positions of three levels together, C decoder width.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from timm.layers import trunc_normal_
from torch import Tensor, nn

from amltrain.models.layers.basic import cell_centres, sine_position
from amltrain.models.layers.deformable import MultiScaleDeformableAttention
from amltrain.records import Features, ModelOutput


class Attention(nn.Module):
    """Multi-head attention whose heads together are wider than its input."""

    def __init__(self, dim: int, inner_dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj = nn.Linear(dim, inner_dim)
        self.k_proj = nn.Linear(dim, inner_dim)
        self.v_proj = nn.Linear(dim, inner_dim)
        self.out_proj = nn.Linear(inner_dim, dim)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
        """Query [B, Q, C], key and value [B, K, C], mask [B, 1, 1, K] bool (True = may be read) -> [B, Q, C]."""
        q, k, v = (
            project(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for project, x in ((self.q_proj, query), (self.k_proj, key), (self.v_proj, value))
        )
        return self.out_proj(F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """Two linear layers with an activation between them."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.relu(self.fc1(x)))


class FusionLayer(nn.Module):
    """Text reads vision, text reads text, vision reads text, vision reads vision; all post-norm."""

    def __init__(self, dim: int, heads: int, points: int, expand: int) -> None:
        super().__init__()
        hidden = dim * expand
        self.v2l_cross_attn = Attention(dim, hidden, heads)
        self.lang_self_attn = Attention(dim, hidden, heads)
        self.lang_mlp = FeedForward(dim, hidden)
        self.l2v_cross_attn = Attention(dim, hidden, heads)
        self.vis_self_attn = MultiScaleDeformableAttention(dim, heads=heads, points=points)
        self.vis_mlp = FeedForward(dim, hidden)
        self.l_norm1, self.l_norm2, self.l_norm3 = (nn.LayerNorm(dim) for _ in range(3))
        self.v_norm1, self.v_norm2, self.v_norm3 = (nn.LayerNorm(dim) for _ in range(3))
        self.gamma_v2l = nn.Parameter(torch.ones(1, 1, dim))
        self.gamma_l2v = nn.Parameter(torch.ones(1, 1, dim))
        for part in (self.v2l_cross_attn, self.lang_self_attn, self.lang_mlp, self.l2v_cross_attn, self.vis_mlp):
            part.apply(init_linear)

    def forward(
        self,
        vision: Tensor,
        text: Tensor,
        position: Tensor,
        reference: Tensor,
        shapes: list[tuple[int, int]],
        text_mask: Tensor,
        vision_mask: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Vision [B, V, C], text [B, L + P, C] -> the same, fused; masks as in `Attention`."""
        read = self.v2l_cross_attn(text, vision + position, vision, vision_mask)
        text = self.l_norm1(text + self.gamma_v2l * read)
        text = self.l_norm2(text + self.lang_self_attn(text, text, text, text_mask))
        text = self.l_norm3(text + self.lang_mlp(text))
        read = self.l2v_cross_attn(vision + position, text, text, text_mask)
        vision = self.v_norm2(vision + self.gamma_l2v * read)
        vision = self.v_norm1(vision + self.vis_self_attn(vision + position, vision, reference, shapes))
        return self.v_norm3(vision + self.vis_mlp(vision)), text


class ConvNorm(nn.Module):
    """Convolution and group norm (32 groups), with an optional ReLU."""

    def __init__(self, in_dim: int, dim: int, *, kernel: int = 1, bias: bool = False, relu: bool = False) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_dim, dim, kernel, padding=kernel // 2, bias=bias)
        self.gn = nn.GroupNorm(32, dim)
        self.relu = relu
        nn.init.kaiming_normal_(self.conv.weight, mode="fan_out", nonlinearity="relu")
        if self.conv.bias is not None:
            nn.init.zeros_(self.conv.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.gn(self.conv(x))
        return F.relu(x) if self.relu else x


class FusionDecoder(nn.Module):
    """Fusion layers over strides 32, 16 and 8, a pyramid step to stride 4, and a mask head made from the text."""

    def __init__(
        self,
        vision_dims: Sequence[int],
        text_dim: int,
        *,
        dim: int,
        layers: int,
        heads: int,
        points: int = 4,
        expand: int = 4,
        prompts: int = 5,
    ) -> None:
        super().__init__()
        finest, *coarser = vision_dims
        self.input_convs = nn.ModuleList(ConvNorm(width, dim, bias=True) for width in reversed(coarser))
        self.level_encoding = nn.Embedding(len(coarser), dim)
        self.lang_in_linear = nn.Linear(text_dim, dim)
        self.lang_in_norm = nn.LayerNorm(dim)
        self.vis_prompts = nn.Embedding(prompts, dim)
        self.encoder = nn.ModuleList(FusionLayer(dim, heads, points, expand) for _ in range(layers))
        self.lateral_convs = nn.ModuleList([ConvNorm(finest, dim)])
        self.output_convs = nn.ModuleList([ConvNorm(dim, dim, kernel=3, relu=True)])
        self.mask_feature = nn.Sequential(
            nn.Conv2d(dim, dim, 1), nn.ReLU(), nn.Conv2d(dim, dim, 1), nn.ReLU(), nn.Conv2d(dim, dim, 1)
        )
        self.lang_embed = nn.Sequential(
            nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, dim)
        )

    def forward(self, features: Features) -> ModelOutput:
        finest, *coarser = features.visual
        levels = [project(m) for project, m in zip(self.input_convs, reversed(coarser), strict=True)]
        shapes = [(m.shape[-2], m.shape[-1]) for m in levels]
        vision, text = self.fuse(levels, shapes, features)
        tokens = features.text.shape[1]

        coarse, *_, fine = vision.transpose(1, 2).split([h * w for h, w in shapes], dim=2)
        pyramid = self.lateral_convs[0](finest)
        fine = F.interpolate(fine.unflatten(2, shapes[-1]), pyramid.shape[-2:], mode="bilinear", align_corners=False)
        mask_features = self.mask_feature(self.output_convs[0](pyramid + fine))

        background, referent = text[:, tokens:].mean(dim=1), text[:, 0]
        classes = self.lang_embed(torch.stack((background, referent), dim=1))  # [B, 2, C]
        logits = torch.einsum("bkc,bchw->bkhw", classes, mask_features)
        return ModelOutput(logits, {"fused_visual": coarse.unflatten(2, shapes[0]), "fused_text": text[:, :tokens]})

    def fuse(self, levels: list[Tensor], shapes: list[tuple[int, int]], features: Features) -> tuple[Tensor, Tensor]:
        """The fusion layers: vision [B, V, C] level after level from coarse to fine, text [B, L + P, C]."""
        device, batch = levels[0].device, levels[0].shape[0]
        vision = torch.cat([m.flatten(2).transpose(1, 2) for m in levels], dim=1)
        position = torch.cat(
            [
                sine_position(h, w, vision.shape[-1], device=device).to(vision.dtype) + code
                for (h, w), code in zip(shapes, self.level_encoding.weight, strict=True)
            ]
        )
        reference = torch.cat([cell_centres(h, w, device=device) for h, w in shapes])
        text = self.lang_in_norm(self.lang_in_linear(features.text))
        prompts = self.vis_prompts.weight.expand(batch, -1, -1)
        text = torch.cat([text, prompts.to(text.dtype)], dim=1)
        text_mask = F.pad(features.text_mask, (0, prompts.shape[1]), value=True)[:, None, None, :]
        vision_mask = visible_positions(features.suppressed, shapes)
        for layer in self.encoder:
            vision, text = layer(vision, text, position, reference, shapes, text_mask, vision_mask)
        return vision, text


def visible_positions(suppressed: Tensor | None, shapes: list[tuple[int, int]]) -> Tensor | None:
    """[B, h, w] bool at the coarsest level -> [B, 1, 1, V] bool over all levels, True = may be read.

    An image whose every position is suppressed is left whole: there would be nothing to attend to.
    """
    if suppressed is None:
        return None
    nothing_left = suppressed.flatten(1).all(dim=1)[:, None, None]
    weak = (suppressed & ~nothing_left)[:, None].float()
    levels = [F.interpolate(weak, size=shape, mode="nearest").flatten(1) for shape in shapes]
    return (torch.cat(levels, dim=1) == 0)[:, None, None, :]


def init_linear(module: nn.Module) -> None:
    """Draw a linear layer's weights as CARIS does; for `Module.apply`."""
    if isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)
