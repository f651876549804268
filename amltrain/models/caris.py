"""CARIS: late fusion, a text encoder that reads prompts made from the image, and a bidirectional pixel decoder.

Paper: Liu et al., CARIS: Context-Aware Referring Image Segmentation, ACM MM 2023.
Official code: lsa1997/CARIS, commit 4b24546, MIT. Reimplemented on timm's Swin and transformers' BERT.

Kept from the official code on purpose: the vision stream's second norm comes before its first; the mask head has no
scale and no bias; the referent's vector is [CLS] alone; the pyramid step interpolates with align_corners=False.
Not kept: clamps at +-50000, which change nothing in float32, and SyncBN, because there is no batch norm.

What AML scores: the stride-32 Swin map, which has seen no word, against BERT's token features, which are conditioned on
the image through the prompts (as in the official AML code); `text="plain"` (aml.text) runs BERT once more without them.

Dimensions: B batch, L text tokens, P prompts, C_v and C_t widths of the two encoders.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import BertModel

from amltrain.config.schema import Preprocess
from amltrain.models.backbones.swin import Swin
from amltrain.models.backbones.text import build_bert, encode_tokens, set_bert_gradient_checkpointing
from amltrain.models.backbones.weights import load_encoders
from amltrain.models.base import Conversion, RISModel, convert
from amltrain.models.layers.fusion_decoder import FusionDecoder, init_linear
from amltrain.models.registry import NETWORK_FRAME, ModelInfo, register_model
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
        self.in_linears.apply(init_linear)
        self.out_linears.apply(init_linear)

    def forward(self, visual: Tensor) -> Tensor:
        """Visual [B, C_v, h, w] -> [B, P, C_t]."""
        pooled = [F.adaptive_avg_pool2d(visual, grid).flatten(2).transpose(1, 2) for grid in self.grids]
        prompts = [
            project_out(F.relu(project_in(cells)))
            for cells, project_in, project_out in zip(pooled, self.in_linears, self.out_linears, strict=True)
        ]
        return self.lang_prompts_norm(torch.cat(prompts, dim=1) + self.lang_prompts.weight)


class CARIS(RISModel):
    """Swin, BERT with image prompts, and the fusion decoder; two-channel logits at stride 4."""

    encoders = ("vision", "text")
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
