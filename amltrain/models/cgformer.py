"""CGFormer: two learned tokens share out the image's positions between them; the second becomes the mask.

Paper: Tang et al., Contrastive Grouping with Transformer for Referring Image Segmentation, CVPR 2023.
Official code: SooLab/CGFormer, commit 67d3390, MIT; its Swin backbone from LAVT, GPL-3.0. Reimplemented; no code
is copied.

What AML scores: a second look at the image without words (see `early_fusion`).

Kept from the official code on purpose:
- positions are assigned to tokens with Gumbel noise, in evaluation too. Here the noise is a function of the sample's
  `random_key`, so that evaluations repeat; `assignment_noise=False` turns it off;
- the mask's 1x1 kernel is applied with a padding of 1, so a ring of bias surrounds the mask before the last resizing;
- only the mask token reads the words; the token MLPs have no residual;
- pixels that two polygons of one object share are background (it cuts 254/255 down to 0), in training and in scores.
Not kept: the last gate and modules of the two loading units that nothing reads (4.2 M parameters without gradient). At
sizes other than the official 480 the position tables are resized, where the official code fails. The last 1x1
convolution is folded into the mask's kernel, which is the same map without a 512-channel tensor at full size.

Dimensions: B batch, K tokens, P positions of a level, D width, L text tokens.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import trunc_normal_
from torch import Tensor, nn
from transformers import BertModel

from amltrain.config.schema import Preprocess, Protocol
from amltrain.models.backbones.swin import OFFICIAL_NAMES, LanguageSwin, Swin
from amltrain.models.backbones.text import build_bert
from amltrain.models.backbones.weights import load_encoders
from amltrain.models.base import Conversion, convert
from amltrain.models.families import EarlyFusionModel
from amltrain.models.registry import ModelInfo, register_model
from amltrain.randomness import uniform
from amltrain.records import Batch, Features, ModelOutput

NOISE_STREAM = 1 << 20  # apart from AML's own draws from the same key

RENAMES = [
    (r"^decoder\.tokens\.weight", "decoder.tokens"),
    (r"^decoder\.layers\.(\d)\.positional_embedding", r"decoder.positions.\1"),
    (r"^decoder\.layers\.1\.", "decoder.loading.0."),
    (r"^decoder\.layers\.2\.", "decoder.loading.1."),
    (r"\.loadtoken\.cross_attn\.", "."),
    (r"\.loadtoken\.", "."),
    (r"^decoder\.cgattention1\.", "decoder.grouping.0."),
    (r"^decoder\.cgattention2\.", "decoder.grouping.1."),
    (r"^decoder\.fuses\.(\d)\.fusion\.", r"decoder.fuses.\1."),
    (r"^decoder\.proj\.vis\.1\.", "decoder.refine.0."),
    (r"^decoder\.proj\.vis\.3\.", "decoder.refine.1."),
    (r"^decoder\.proj\.vis\.4\.", "decoder.last."),
    (r"^decoder\.proj\.txt\.", "decoder.kernel."),
    (r"^(decoder\..*)\.mlp\.fc1\.", r"\1.mlp.0."),
    (r"^(decoder\..*)\.mlp\.fc2\.", r"\1.mlp.3."),
]
DROPS = [
    (r"backbone\..*\.relative_position_index", "an index table, recomputed from the window size"),
    (r"backbone\.layers\.3\.pwam_gate\..*", "unused: nothing follows the last stage"),
    (r"decoder\.layers\.\d\.loadtoken\.(norm|mlp)\..*", "unused by the official code"),
]


def convolution(in_dim: int, dim: int, *, bias: bool) -> list[nn.Module]:
    """3x3 convolution, batch norm, ReLU."""
    return [nn.Conv2d(in_dim, dim, 3, padding=1, bias=bias), nn.BatchNorm2d(dim), nn.ReLU()]


def token_mlp(dim: int, dropout: float) -> nn.Sequential:
    """Two linear layers with dropout, twice as wide inside."""
    return nn.Sequential(
        nn.Linear(dim, 2 * dim), nn.GELU(), nn.Dropout(dropout), nn.Linear(2 * dim, dim), nn.Dropout(dropout)
    )


class TokenLoading(nn.Module):
    """The mask token reads the words; then every token passes an MLP."""

    def __init__(self, dim: int, text_dim: int, dropout: float) -> None:
        super().__init__()
        self.normq = nn.LayerNorm(dim)
        self.normk = nn.LayerNorm(text_dim)
        self.q_proj = nn.Linear(dim, dim, bias=False)
        self.k_proj = nn.Linear(text_dim, dim, bias=False)
        self.v_proj = nn.Linear(text_dim, dim, bias=False)
        self.proj = nn.Linear(dim, dim)
        self.norm = nn.LayerNorm(dim)
        self.mlp = token_mlp(dim, 0.0)
        self.dropout = dropout

    def forward(self, tokens: Tensor, text: Tensor, text_mask: Tensor) -> Tensor:
        """Tokens [B, K, D], text [B, L, C], text_mask [B, L] bool -> [B, K, D]."""
        mask_token = tokens[:, -1:]
        words, real = self.normk(text), text_mask[..., None]
        query = self.q_proj(self.normq(mask_token))
        bias = (text_mask.to(query.dtype) - 1)[:, None, None] * 1e4  # [B, 1, 1, L]
        # one head, written as a dimension: ONNX converts attention of four dimensions only
        read = F.scaled_dot_product_attention(
            query[:, None],
            (self.k_proj(words) * real)[:, None],
            (self.v_proj(words) * real)[:, None],
            attn_mask=bias,
            dropout_p=self.dropout if self.training else 0.0,
        ).squeeze(1)
        mask_token = mask_token + F.dropout(self.proj(read), self.dropout, self.training)
        return self.mlp(self.norm(torch.cat([tokens[:, :-1], mask_token], dim=1)))


class Grouping(nn.Module):
    """Every position goes to the token it is most like; every token becomes the mean of its positions, transformed."""

    def __init__(self, dim: int, dropout: float) -> None:
        super().__init__()
        self.norm_v = nn.LayerNorm(dim)
        self.norm_t = nn.LayerNorm(dim)
        self.q_proj = nn.Linear(dim, dim)
        self.k_proj = nn.Linear(dim, dim)
        self.v_proj = nn.Linear(dim, dim)
        self.proj = nn.Linear(dim, dim)
        self.norm = nn.LayerNorm(dim)
        self.mlp = token_mlp(dim, dropout)
        self.dropout = nn.Dropout(dropout)
        self.tau = nn.Parameter(torch.ones(1))

    def forward(
        self, tokens: Tensor, visual: Tensor, noise: Tensor | None, suppressed: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Tokens [B, K, D], visual [B, P, D] with positions, Gumbel noise [B, K, P] or None, suppressed [B, P] bool or
        None: positions no token reads -> tokens [B, K, D], assignment [B, K, P] in {0, 1} with a soft gradient.
        """
        visual = self.norm_v(visual)
        query, key = self.q_proj(self.norm_t(tokens)), self.k_proj(visual)
        query = query / (query.norm(dim=-1, keepdim=True) + 1e-12)
        key = key / (key.norm(dim=-1, keepdim=True) + 1e-12)
        scores = query @ key.transpose(1, 2)
        if noise is not None:
            scores = scores + noise
        soft = (scores / self.tau.clamp(max=0).exp()).softmax(dim=1)
        hard = torch.zeros_like(soft).scatter_(1, soft.argmax(dim=1, keepdim=True), 1.0)
        assignment = hard - soft.detach() + soft
        read = assignment if suppressed is None else assignment * ~suppressed[:, None]
        share = read / (read.sum(dim=-1, keepdim=True) + 1)
        values = self.v_proj(visual)
        tokens = tokens + self.dropout(self.proj(share.to(values.dtype) @ values))
        return self.mlp(self.norm(tokens)), assignment


class GroupingDecoder(nn.Module):
    """Three rounds of grouping from stride 16 to stride 4, and a mask from the last token."""

    def __init__(
        self,
        in_dims: Sequence[int],
        *,
        dim: int = 512,
        text_dim: int = 768,
        tokens: int = 2,
        sides: Sequence[int] = (30, 60, 120),
        dropout: float = 0.1,
    ) -> None:
        """in_dims: widths of the maps at strides 4, 8, 16, 32. sides: the levels' map sizes at the training size."""
        super().__init__()
        finest, fine, coarse, coarsest = in_dims
        self.tokens = nn.Parameter(trunc_normal_(torch.empty(tokens, dim), std=0.02))
        self.positions = nn.ParameterList(torch.randn(side * side, dim) / math.sqrt(dim) for side in sides)
        self.fuses = nn.ModuleList(
            nn.Sequential(*convolution(width, dim, bias=True), *convolution(dim, dim, bias=True))
            for width in (coarsest + coarse, dim + fine, dim + finest)
        )
        self.loading = nn.ModuleList(TokenLoading(dim, text_dim, dropout) for _ in range(2))
        self.grouping = nn.ModuleList(Grouping(dim, dropout) for _ in range(2))
        self.refine = nn.ModuleList(nn.Sequential(*convolution(dim, dim, bias=False)) for _ in range(2))
        self.last = nn.Conv2d(dim, dim, 1)
        self.kernel = nn.Linear(dim, dim + 1)

    def forward(self, features: Features, keys: Tensor | None) -> tuple[Tensor, list[Tensor], Tensor]:
        """Encoded maps and words, random keys [B] int64 or None for no noise -> logits [B, 1, h, w], the mask token's
        assignments [B, h_i, w_i] from coarse to fine, the coarsest fused map [B, D, h_0, w_0].
        """
        maps = features.visual
        tokens = self.tokens.expand(features.text.shape[0], -1, -1)
        visual = maps[3]
        fused, assigned = [], []
        for level, other in enumerate((maps[2], maps[1], maps[0])):
            visual = self.fuses[level](merge(visual, other))
            fused.append(visual)
            if level > 0:
                tokens = self.loading[level - 1](tokens, features.text, features.text_mask)
            size = visual.shape[-2:]
            positions = visual.flatten(2).transpose(1, 2) + self.position(level, size).to(visual.dtype)
            noise = None if keys is None else self.noise(keys, level, positions.shape[1])
            hidden = features.suppressed
            if hidden is not None:
                hidden = F.interpolate(hidden[:, None].float(), size=size).flatten(1) > 0.5
            tokens, assignment = self.grouping[min(level, 1)](tokens, positions, noise, hidden)
            assigned.append(assignment[:, -1].unflatten(1, size))
        return self.mask(visual, tokens[:, -1]), assigned, fused[0]

    def position(self, level: int, size: tuple[int, int]) -> Tensor:
        """Learned position codes [P, D] of a map; resized if it is not the training size's."""
        table = self.positions[level]
        side = math.isqrt(len(table))
        if tuple(size) == (side, side):
            return table
        grid = table.T.unflatten(1, (side, side))[None]
        return F.interpolate(grid, size=size, mode="bilinear", align_corners=False)[0].flatten(1).T

    def noise(self, keys: Tensor, level: int, positions: int) -> Tensor:
        """Gumbel(0, 1) noise [B, K, P], a function of the keys."""
        tokens = len(self.tokens)
        drawn = uniform(keys, tokens * positions, stream=NOISE_STREAM + level).clamp(min=2**-25)
        return -torch.log(-torch.log(drawn)).unflatten(1, (tokens, positions))

    def mask(self, visual: Tensor, token: Tensor) -> Tensor:
        """Visual [B, D, h, w] at stride 4, token [B, D] -> logits [B, 1, 4 h + 2, 4 w + 2]."""
        for refine in self.refine:
            visual = refine(F.interpolate(visual, scale_factor=2, mode="bilinear", align_corners=False))
        weight, bias = self.kernel(token).split([token.shape[1], 1], dim=1)
        folded = weight @ self.last.weight.flatten(1)
        logits = torch.einsum("bd,bdhw->bhw", folded, visual) + (weight @ self.last.bias)[:, None, None]
        return (F.pad(logits, (1, 1, 1, 1)) + bias[..., None])[:, None]


def merge(one: Tensor, other: Tensor) -> Tensor:
    """Concatenate two maps at the larger one's size."""
    if one.shape[-1] < other.shape[-1]:
        one = F.interpolate(one, size=other.shape[-2:], mode="bilinear", align_corners=True)
    else:
        other = F.interpolate(other, size=one.shape[-2:], mode="bilinear", align_corners=True)
    return torch.cat([one, other], dim=1)


class CGFormer(EarlyFusionModel):
    """BERT, a Swin that reads it, and the grouping decoder."""

    backbone: LanguageSwin
    mask_channels = 1
    supports_suppression = True

    def __init__(
        self,
        *,
        backbone: LanguageSwin,
        text_encoder: BertModel,
        decoder: GroupingDecoder,
        assignment_noise: bool = True,
    ) -> None:
        super().__init__(backbone=backbone, text_encoder=text_encoder, trained_text_layers=None)
        self.decoder = decoder
        self.assignment_noise = assignment_noise
        self.fused_dims = (decoder.tokens.shape[-1], text_encoder.config.hidden_size)

    def decode(self, features: Features, batch: Batch) -> ModelOutput:
        """Logits [B, 1, H, W]; aux "assigned0".."assigned2" [B, h_i, w_i], from coarse to fine."""
        keys = batch.random_key if self.assignment_noise else None
        logits, assigned, fused = self.decoder(features, keys)
        logits = F.interpolate(logits, size=batch.image.shape[-2:], mode="bilinear", align_corners=True)
        aux = {f"assigned{i}": assignment for i, assignment in enumerate(assigned)}
        return ModelOutput(logits, {**aux, "fused_visual": fused, "fused_text": features.text})

    def param_groups(self, lr: float, weight_decay: float) -> list[dict[str, Any]]:
        """Half the rate for the Swin trunk with its output norms and for BERT; everything decays, norms too."""
        parts = {
            "decoder": (self.decoder, lr),
            "fusion": (nn.ModuleList([self.backbone.fusion, self.backbone.gates]), lr),
            "vision": (self.backbone.swin, lr / 2),
            "text": (self.text_encoder, lr / 2),
        }
        groups = []
        for name, (module, rate) in parts.items():
            params = [p for p in module.parameters() if p.requires_grad]
            groups.append({"name": name, "params": params, "lr": rate, "weight_decay": weight_decay})
        return groups

    def convert_state_dict(self, official: Mapping[str, Tensor]) -> Conversion:
        return convert(official, self.state_dict(), renames=[*OFFICIAL_NAMES, *RENAMES], drops=DROPS)


def _info(size: int, tokenizer: str, max_tokens: int = 20) -> ModelInfo:
    return ModelInfo(
        paper="Contrastive Grouping with Transformer for Referring Image Segmentation (CVPR 2023)",
        official_code="github.com/SooLab/CGFormer, commit 67d3390",
        licence="MIT; its Swin backbone from LAVT, GPL-3.0",
        aml_scores="last Swin blocks without fusion x BERT tokens",
        preprocess=Preprocess(
            size=size,
            resize="square",
            normalization="imagenet",
            tokenizer=tokenizer,
            max_tokens=max_tokens,
            sentence_field="sent",
        ),
        protocol=Protocol(
            frame="original", threshold=0.5, interpolation="bicubic", sentences="all", ties="gt", mask_parts="exclusive"
        ),
        loss="cgformer",
    )


@register_model(_info(480, "bert-base-uncased"))
def cgformer_swin_base(
    *,
    vision_weights: str | None = None,
    text_weights: str | None = None,
    vocab_size: int = 30522,
    drop_path_rate: float = 0.3,
    text_dropout: float = 0.1,
    assignment_noise: bool = True,
) -> CGFormer:
    """The official model: Swin-B with window 12 and BERT-base, 249.5 M parameters (253.7 M with the unused ones).

    vision_weights, text_weights: where pretrained encoders come from, see `amltrain.models.backbones.weights`.
    """
    swin = Swin(window_size=12, drop_path_rate=drop_path_rate)
    text = build_bert(vocab_size=vocab_size, dropout=text_dropout)
    load_encoders(swin, text, vision_weights, text_weights)
    decoder = GroupingDecoder(swin.channels)
    return CGFormer(
        backbone=LanguageSwin(swin, heads=8), text_encoder=text, decoder=decoder, assignment_noise=assignment_noise
    )


@register_model(_info(96, "wordpiece", max_tokens=24))
def cgformer_tiny(
    *,
    vision_weights: str | None = None,
    text_weights: str | None = None,
    vocab_size: int = 512,
    drop_path_rate: float = 0.0,
    text_dropout: float = 0.0,
    assignment_noise: bool = True,
) -> CGFormer:
    """Small enough to learn synthetic scenes from scratch on two CPU cores."""
    swin = Swin(embed_dim=32, depths=(2, 2, 2, 2), num_heads=(1, 2, 4, 8), window_size=3, drop_path_rate=drop_path_rate)
    text = build_bert(vocab_size=vocab_size, hidden_size=128, layers=2, heads=4, max_positions=64, dropout=text_dropout)
    load_encoders(swin, text, vision_weights, text_weights)
    decoder = GroupingDecoder(swin.channels, dim=64, text_dim=128, sides=(6, 12, 24), dropout=0.0)
    return CGFormer(
        backbone=LanguageSwin(swin, text_dim=128, heads=2),
        text_encoder=text,
        decoder=decoder,
        assignment_noise=assignment_noise,
    )
