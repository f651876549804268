"""LAVT and LAVT-one: language fused inside the stages of Swin, and a light convolutional decoder.

Paper: Yang et al., LAVT: Language-Aware Vision Transformer for Referring Image Segmentation, CVPR 2022.
Official code: yz93/LAVT-RIS, commit 1da0af9, GPL-3.0. Reimplemented from facts about it, on timm and transformers.
Its two variants differ only in where the checkpoint keeps BERT; both load.

What AML scores: the image without words, that is the last stage's blocks with every gate shut, against BERT's tokens.
AML's first pass encodes the original image anyway, so this costs no more than encoding it with words.
`visual="conditioned"` (aml.visual) takes the same blocks' output as the trained network has it, words of the earlier
stages included. AML level "feature" has no place here: no attention across modalities reads image positions.

Kept from the official code on purpose: scores of the fusion are scaled by the whole width; padding comes before
rolling. Not kept: the last stage's gate, whose output nothing reads (it would need DDP's search for unused parameters).
BERT's embeddings and layers 10 and 11 are frozen here, where the official code leaves them out of the optimizer.

Dimensions: B batch, H W a map's size, C its width, L text tokens, D text width.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import BertModel

from amltrain.config.schema import Preprocess
from amltrain.models.backbones.swin import OFFICIAL_NAMES, LanguageSwin, Swin
from amltrain.models.backbones.text import build_bert
from amltrain.models.backbones.weights import load_encoders
from amltrain.models.base import Conversion, convert
from amltrain.models.families import EarlyFusionModel
from amltrain.models.registry import NETWORK_FRAME_EXCLUSIVE, ModelInfo, register_model
from amltrain.records import AlignmentFeatures, Batch, Features, ModelOutput

RENAMES = [
    *OFFICIAL_NAMES,
    *((rf"^classifier\.(conv|bn)([12])_{4 - i}\.", rf"decoder.levels.{i}.\1\2.") for i in range(3)),
    (r"^classifier\.conv1_1\.", "decoder.head."),
]
DROPS = [
    (r"backbone\..*\.relative_position_index", "an index table, recomputed from the window size"),
    (r"text_encoder\.embeddings\.position_ids", "an index table of older transformers versions"),
    (
        r"backbone\.layers\.3\.res_gate\.[02]\.weight",
        "the last stage's gate, whose output the official code never uses",
    ),
]


class MergeLevels(nn.Module):
    """Upsample a coarse map to a finer one, join both, and apply two 3x3 convolutions."""

    def __init__(self, in_dim: int, dim: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_dim, dim, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(dim)
        self.conv2 = nn.Conv2d(dim, dim, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(dim)

    def forward(self, coarse: Tensor, fine: Tensor) -> Tensor:
        """Coarse [B, C_1, h, w], fine [B, C_2, H, W] -> [B, C, H, W]."""
        if coarse.shape[-2:] != fine.shape[-2:]:
            coarse = F.interpolate(coarse, fine.shape[-2:], mode="bilinear", align_corners=True)
        x = F.relu(self.bn1(self.conv1(torch.cat((coarse, fine), dim=1))))
        return F.relu(self.bn2(self.conv2(x)))


class LevelDecoder(nn.Module):
    """From the coarsest map to the finest, one `MergeLevels` per step; two-channel logits at stride 4."""

    def __init__(self, channels: Sequence[int]) -> None:
        """channels: widths of the maps, fine to coarse; the decoder is half as wide as the coarsest."""
        super().__init__()
        *finer, coarsest = channels
        dim = coarsest // 2
        self.levels = nn.ModuleList(
            MergeLevels(fine + (dim if i else coarsest), dim) for i, fine in enumerate(reversed(finer))
        )
        self.head = nn.Conv2d(dim, 2, 1)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Maps [B, C_i, h_i, w_i], fine to coarse -> [B, 2, h_0, w_0]."""
        *finer, x = maps
        for merge, fine in zip(self.levels, reversed(finer), strict=True):
            x = merge(x, fine)
        return self.head(x)


class LAVT(EarlyFusionModel):
    """BERT, a Swin that reads it, and the decoder."""

    backbone: LanguageSwin
    mask_channels = 2
    alignment_visuals = ("unimodal", "conditioned")

    def __init__(
        self,
        *,
        backbone: LanguageSwin,
        text_encoder: BertModel,
        trained_text_layers: int | None = 10,
    ) -> None:
        super().__init__(backbone=backbone, text_encoder=text_encoder, trained_text_layers=trained_text_layers)
        self.decoder = LevelDecoder(backbone.channels)
        self.fused_dims = self.alignment_dims

    def decode(self, features: Features, batch: Batch) -> ModelOutput:
        """The words are read in the stages and not rewritten: BERT's tokens are the fused text too."""
        aux = {"fused_visual": features.visual[-1], "fused_text": features.text}
        return ModelOutput(self.decoder(features.visual), aux)

    def alignment_features(
        self, batch: Batch, features: Features | None = None, *, text: str | None = None, visual: str | None = None
    ) -> AlignmentFeatures:
        if visual != "conditioned":
            return super().alignment_features(batch, features)
        tokens = self._encode_text(batch) if features is None else features.text
        deepest = self.backbone.before_last_fusion(batch.image, tokens, batch.text_mask)
        return AlignmentFeatures(deepest, tokens, batch.text_mask)

    def param_groups(self, lr: float, weight_decay: float) -> list[dict[str, Any]]:
        """One learning rate; only norms and position bias tables of the backbone do not decay."""
        undecayed = ("norm", "relative_position_bias_table")
        groups: dict[str, list[nn.Parameter]] = {}
        for name, parameter in self.named_parameters():
            if parameter.requires_grad:
                part = name.split(".")[0]
                decays = part != "backbone" or not any(word in name for word in undecayed)
                groups.setdefault(part if decays else f"{part}_no_decay", []).append(parameter)
        return [
            {"name": name, "params": p, "lr": lr, "weight_decay": 0.0 if name.endswith("no_decay") else weight_decay}
            for name, p in groups.items()
        ]

    def convert_state_dict(self, official: Mapping[str, Tensor]) -> Conversion:
        """BERT under `text_encoder.`, as lavt_one keeps it; lavt's second file entry is to be given that prefix."""
        return convert(official, self.state_dict(), renames=RENAMES, drops=DROPS)


def _info(size: int, tokenizer: str, max_tokens: int) -> ModelInfo:
    return ModelInfo(
        paper="LAVT: Language-Aware Vision Transformer for Referring Image Segmentation (CVPR 2022)",
        official_code="github.com/yz93/LAVT-RIS, commit 1da0af9",
        licence="GPL-3.0",
        aml_scores="last Swin blocks without words x BERT tokens",
        preprocess=Preprocess(
            size=size,
            resize="square",
            normalization="imagenet",
            tokenizer=tokenizer,
            max_tokens=max_tokens,
            sentence_field="raw",
        ),
        protocol=NETWORK_FRAME_EXCLUSIVE,
        loss="weighted_cross_entropy",
        loss_kwargs={"background_weight": 0.9, "referent_weight": 1.1},
    )


@register_model(_info(480, "bert-base-uncased", max_tokens=20))
def lavt_swin_base(
    *,
    vision_weights: str | None = None,
    text_weights: str | None = None,
    vocab_size: int = 30522,
    window_size: int = 12,
    fusion_heads: int | list[int] = 1,
    drop_path_rate: float = 0.3,
    text_dropout: float = 0.1,
    trained_text_layers: int | None = 10,
) -> LAVT:
    """The official model (lavt and lavt_one): Swin-B with windows of 12 and BERT-base, 225.6 M parameters.

    vision_weights, text_weights: where pretrained encoders come from, see `amltrain.models.backbones.weights`.
    """
    swin = Swin(window_size=window_size, drop_path_rate=drop_path_rate)
    text = build_bert(vocab_size=vocab_size, dropout=text_dropout)
    load_encoders(swin, text, vision_weights, text_weights)
    return LAVT(
        backbone=LanguageSwin(swin, heads=fusion_heads),
        text_encoder=text,
        trained_text_layers=trained_text_layers,
    )


@register_model(_info(96, "wordpiece", max_tokens=24))
def lavt_tiny(
    *,
    vision_weights: str | None = None,
    text_weights: str | None = None,
    vocab_size: int = 512,
    drop_path_rate: float = 0.0,
    text_dropout: float = 0.0,
) -> LAVT:
    """Small enough to learn synthetic scenes from scratch on two CPU cores; all of BERT trains."""
    swin = Swin(embed_dim=32, depths=(2, 2, 2, 2), num_heads=(1, 2, 4, 8), window_size=6, drop_path_rate=drop_path_rate)
    text = build_bert(vocab_size=vocab_size, hidden_size=128, layers=2, heads=4, max_positions=64, dropout=text_dropout)
    load_encoders(swin, text, vision_weights, text_weights)
    return LAVT(
        backbone=LanguageSwin(swin, text_dim=128),
        text_encoder=text,
        trained_text_layers=None,
    )
