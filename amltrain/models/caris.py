"""CARIS: late fusion, a text encoder that reads prompts made from the image, and a bidirectional pixel decoder.

Paper: Liu et al., CARIS: Context-Aware Referring Image Segmentation, ACM MM 2023.
Official code: lsa1997/CARIS, commit 4b24546, MIT. Reimplemented on timm's Swin and transformers' BERT.

Kept from the official code on purpose: the vision stream's second norm comes before its first; the mask head has no
scale and no bias; the referent's vector is [CLS] alone; the pyramid step interpolates with align_corners=False.
Not kept: clamps at +-50000, which change nothing in float32, and SyncBN, because there is no batch norm.

What AML scores: the stride-32 Swin map, which has seen no word, against BERT's token features, which are conditioned on
the image through the prompts (as in the official AML code); `text="plain"` (aml.text) runs BERT once more without them.

Dimensions: B batch, L text tokens, P prompts, V visual positions of three levels together, C decoder width.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import trunc_normal_
from torch import Tensor, nn
from transformers import BertModel

from amltrain.config.schema import Preprocess
from amltrain.models.backbones.bert import build_bert, encode_tokens, set_bert_gradient_checkpointing
from amltrain.models.backbones.swin import Swin
from amltrain.models.backbones.weights import load_encoders
from amltrain.models.base import Conversion, RISModel
from amltrain.models.conventions import NETWORK_FRAME
from amltrain.models.conversion import convert
from amltrain.models.layers.deformable import MultiScaleDeformableAttention
from amltrain.models.layers.position import cell_centres, sine_position
from amltrain.models.registry import ModelInfo, register_model
from amltrain.records import AlignmentFeatures, Batch, Features, ModelOutput

RENAMES = [
    (r"^backbone\.vis_encoder\.", "vision."),
    (r"^backbone\.lang_encoder\.", "text."),
    (r"^backbone\.conditional_prompts\.", "prompts."),
    (r"^pixel_decoder\.", "decoder."),
]
"""The official key names to ours, as rules for `re.sub`: only the modules' names differ."""
DROPS = [
    (r".*\.attn\.relative_position_index", "an index table, recomputed from the window size"),
    (r".*\.embeddings\.position_ids", "an index table of older transformers versions"),
    (r"criterion\..*\.weight", "class weights are arguments of the loss"),
    (r"aug\..*", "the official AML code's projection, which inference does not use"),
]


class ConditionalPrompts(nn.Module):
    """Text-width vectors that tell the text encoder what the image shows: pooled to 1 x 1 and 2 x 2 cells."""

    def __init__(self, vision_dim: int, text_dim: int, grids: Sequence[int] = (1, 2)) -> None:
        super().__init__()
        self.grids = tuple(grids)
        self.in_linears = nn.ModuleList(nn.Linear(vision_dim, text_dim) for _ in grids)
        self.out_linears = nn.ModuleList(nn.Linear(text_dim, text_dim) for _ in grids)
        self.lang_prompts = nn.Embedding(sum(grid * grid for grid in grids), text_dim)
        self.lang_prompts_norm = nn.LayerNorm(text_dim)
        self.in_linears.apply(_init_linear)
        self.out_linears.apply(_init_linear)

    def forward(self, visual: Tensor) -> Tensor:
        """visual [B, C_v, h, w] -> [B, P, C_t]."""
        pooled = [F.adaptive_avg_pool2d(visual, grid).flatten(2).transpose(1, 2) for grid in self.grids]
        prompts = [
            project_out(F.relu(project_in(cells)))
            for cells, project_in, project_out in zip(pooled, self.in_linears, self.out_linears, strict=True)
        ]
        return self.lang_prompts_norm(torch.cat(prompts, dim=1) + self.lang_prompts.weight)


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
        """query [B, Q, C], key and value [B, K, C], mask [B, 1, 1, K] bool (True = may be read) -> [B, Q, C]."""
        q, k, v = (
            project(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for project, x in ((self.q_proj, query), (self.k_proj, key), (self.v_proj, value))
        )
        return self.out_proj(F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
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
            part.apply(_init_linear)

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
        """vision [B, V, C], text [B, L + P, C] -> the same, fused; masks as in `Attention`."""
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


def _init_linear(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)


class CARIS(RISModel):
    """Swin, BERT with image prompts, and the fusion decoder; two-channel logits at stride 4."""

    mask_channels = 2
    supports_suppression = True
    alignment_texts = ("prompted", "plain")
    encodes_image_alone = True

    def __init__(
        self,
        *,
        vision: Swin,
        text: BertModel,
        dim: int = 256,
        layers: int = 6,
        heads: int = 8,
        encoder_lr_scale: float = 0.1,
    ) -> None:
        """vision, text: built encoders. dim: decoder width, a multiple of 32. layers, heads: of the decoder.

        encoder_lr_scale: what the encoders' learning rate is multiplied by; 1 where they start from nothing.
        """
        super().__init__()
        self.vision, self.text = vision, text
        text_dim = text.config.hidden_size
        self.prompts = ConditionalPrompts(vision.channels[-1], text_dim)
        self.decoder = FusionDecoder(vision.channels, text_dim, dim=dim, layers=layers, heads=heads)
        self.encoder_lr_scale = encoder_lr_scale
        self.alignment_dims = (vision.channels[-1], text_dim)
        self.fused_dims = (dim, dim)

    def encode(self, batch: Batch) -> Features:
        return self.encode_with_image(batch, self.encode_image(batch.image))

    def encode_image(self, image: Tensor) -> tuple[Tensor, ...]:
        return self.vision(image)

    def encode_with_image(self, batch: Batch, image: tuple[Tensor, ...]) -> Features:
        """Encode the sentence; BERT reads prompts made of the image, so it runs for every (image, sentence) pair."""
        text = encode_tokens(self.text, batch.input_ids, batch.text_mask, self.prompts(image[-1]))
        return Features(image, text[:, : batch.input_ids.shape[1]], batch.text_mask)

    def decode(self, features: Features, batch: Batch) -> ModelOutput:
        return self.decoder(features)

    def alignment_features(
        self, batch: Batch, features: Features | None = None, *, text: str | None = None, visual: str | None = None
    ) -> AlignmentFeatures:
        if text == "plain":
            tokens = encode_tokens(self.text, batch.input_ids, batch.text_mask)
            maps = self.vision(batch.image) if features is None else features.visual
            return AlignmentFeatures(maps[-1], tokens, batch.text_mask)
        return super().alignment_features(batch, features)

    def reencode_image(self, batch: Batch, features: Features) -> Features:
        return features._replace(visual=self.vision(batch.image))

    def param_groups(self, lr: float, weight_decay: float) -> list[dict[str, Any]]:
        """The official six groups: encoders at a tenth of the rate; norms, embeddings and prompts do not decay.

        Group norms, gammas and biases do decay, as in the official code.
        """
        parts = {
            "text": (self.text, self.encoder_lr_scale, ("norm", "embeddings")),
            "vision": (self.vision, self.encoder_lr_scale, ("norm", "relative_position_bias_table")),
            "prompts": (self.prompts, 1.0, ("norm", "lang_prompts")),
            "decoder": (self.decoder, 1.0, ("norm", "prompt")),
        }
        groups: dict[str, dict[str, Any]] = {}
        for part, (module, scale, undecayed) in parts.items():
            kind = part if part in ("text", "vision") else "rest"
            for name, parameter in module.named_parameters():
                if not parameter.requires_grad:
                    continue
                decays = not any(word in name.lower() for word in undecayed)
                group = groups.setdefault(
                    f"{kind}_{'decay' if decays else 'no_decay'}",
                    {"params": [], "lr": lr * scale, "weight_decay": weight_decay if decays else 0.0},
                )
                group["params"].append(parameter)
        return [{"name": name, **group} for name, group in groups.items()]

    def convert_state_dict(self, official: Mapping[str, Tensor]) -> Conversion:
        """Convert a state dict of the official CARIS or AML code."""
        return convert(official, self.state_dict(), renames=RENAMES, drops=DROPS)

    def set_gradient_checkpointing(self, enabled: bool) -> None:
        self.vision.set_gradient_checkpointing(enabled)
        set_bert_gradient_checkpointing(self.text, enabled)


def _info(size: int, tokenizer: str, max_tokens: int = 20) -> ModelInfo:
    return ModelInfo(
        paper="CARIS: Context-Aware Referring Image Segmentation (ACM MM 2023)",
        official_code="github.com/lsa1997/CARIS, commit 4b24546",
        licence="MIT",
        aml_scores="stride-32 Swin map x BERT tokens conditioned on the image",
        preprocess=Preprocess(
            size=size,
            resize="square",
            normalization="imagenet",
            tokenizer=tokenizer,
            max_tokens=max_tokens,
            sentence_field="sent",
        ),
        protocol=NETWORK_FRAME,
        loss="weighted_cross_entropy",
        loss_kwargs={"background_weight": 0.9, "referent_weight": 1.1},
    )


@register_model(_info(448, "bert-base-uncased"))
def caris_swin_base(
    *,
    vision_weights: str | None = None,
    text_weights: str | None = None,
    vocab_size: int = 30522,
    window_size: int = 7,
    drop_path_rate: float = 0.3,
    text_dropout: float = 0.1,
) -> CARIS:
    """The official model: Swin-B and BERT-base, 226.6 M parameters.

    vision_weights, text_weights: where pretrained encoders come from, see `amltrain.models.backbones.weights`.
    """
    vision = Swin(window_size=window_size, drop_path_rate=drop_path_rate)
    return _full_size(vision, vision_weights, text_weights, vocab_size, text_dropout)


@register_model(_info(448, "bert-base-uncased"))
def caris_swin_tiny(
    *,
    vision_weights: str | None = None,
    text_weights: str | None = None,
    vocab_size: int = 30522,
    window_size: int = 7,
    drop_path_rate: float = 0.3,
    text_dropout: float = 0.1,
) -> CARIS:
    """The smaller official option, without published numbers: Swin-T and BERT-base, 166.8 M parameters."""
    vision = Swin(
        embed_dim=96,
        depths=(2, 2, 6, 2),
        num_heads=(3, 6, 12, 24),
        window_size=window_size,
        drop_path_rate=drop_path_rate,
    )
    return _full_size(vision, vision_weights, text_weights, vocab_size, text_dropout)


def _full_size(
    vision: Swin,
    vision_weights: str | None,
    text_weights: str | None,
    vocab_size: int,
    text_dropout: float,
) -> CARIS:
    text = build_bert(vocab_size=vocab_size, dropout=text_dropout)
    load_encoders(vision, text, vision_weights, text_weights)
    return CARIS(vision=vision, text=text)


@register_model(_info(96, "wordpiece", max_tokens=24))
def caris_tiny(
    *,
    vision_weights: str | None = None,
    text_weights: str | None = None,
    vocab_size: int = 512,
    drop_path_rate: float = 0.0,
    text_dropout: float = 0.0,
) -> CARIS:
    """Small enough to learn synthetic scenes from scratch on two CPU cores."""
    vision = Swin(
        embed_dim=32,
        depths=(2, 2, 2, 2),
        num_heads=(1, 2, 4, 8),
        window_size=6,
        drop_path_rate=drop_path_rate,
    )
    text = build_bert(vocab_size=vocab_size, hidden_size=128, layers=2, heads=4, max_positions=64, dropout=text_dropout)
    load_encoders(vision, text, vision_weights, text_weights)
    return CARIS(vision=vision, text=text, dim=64, layers=3, heads=4, encoder_lr_scale=1.0)
