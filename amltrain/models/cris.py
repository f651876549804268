"""CRIS: CLIP's ResNet and text tower, joined by a pyramid that the sentence gates, and a decoder from pixels to words.

Paper: Wang et al., CRIS: CLIP-Driven Referring Image Segmentation, CVPR 2022.
Official code: DerrickWang005/CRIS.pytorch, commit e596332, MIT. Reimplemented on timm's ResNet stages and torch's
attention. The decoder and the head are in `layers/cris_decoder.py`, because ETRIS and DETRIS share them.

Kept from the official code on purpose: the sentence's vector passes a batch norm over the batch, so that training needs
more than one sample per process or SyncBN; position tables train at the full rate. In its first epoch the official code
trains all of CLIP so, at ten times its own rate, because its optimizer does not read the group's before the first
scheduler step: the recipes and `configs/models/` repeat that (`optim.first_epoch_full_lr: true`); false is what was
meant. Not kept: CLIP's unread temperature counts as trainable there and is frozen here.

What AML scores: the pooled stride-32 map against the tokens projected into CLIP's shared space. Both are as wide and no
fusion has happened, so `aml.projection: identity` works.

Dimensions: B batch, L text tokens, W text width, E width of CLIP's shared space, D decoder width (= W).
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from amltrain.config.schema import Preprocess
from amltrain.errors import UserError
from amltrain.models.backbones.clip import OFFICIAL_NAMES, CLIPText, load_clip_text
from amltrain.models.backbones.resnet import OFFICIAL_VISION_NAMES, CLIPResNet, load_clip_resnet
from amltrain.models.base import Conversion, convert
from amltrain.models.families import PixelTextModel
from amltrain.models.layers.cris_decoder import OFFICIAL_DECODER_NAMES, conv_norm_relu, with_coordinates
from amltrain.models.registry import LETTERBOX_UNDONE, ModelInfo, register_model
from amltrain.records import AlignmentFeatures, Batch, Features

STRIDE = 32

RENAMES = [
    (r"^backbone\.visual\.", "vision."),
    (r"^backbone\.", "text."),
    *OFFICIAL_VISION_NAMES,
    *OFFICIAL_NAMES,
    (r"^neck\.txt_proj\.", "neck.sentence."),
    (r"^neck\.norm_layer\.0\.", "neck.gated_norm."),
    (r"^neck\.f1_v_proj\.", "neck.coarse."),
    (r"^neck\.f2_v_proj\.", "neck.middle."),
    (r"^neck\.f2_cat\.", "neck.middle_join."),
    (r"^neck\.f3_v_proj\.", "neck.fine."),
    (r"^neck\.f3_cat\.", "neck.fine_join."),
    *((rf"^neck\.f4_proj{i + 3}\.", f"neck.levels.{i}.") for i in range(3)),
    (r"^neck\.aggr\.", "neck.aggregate."),
    (r"^neck\.coordconv\.0\.conv1\.", "neck.locate.0."),
    (r"^neck\.coordconv\.1\.", "neck.locate.1."),
    *OFFICIAL_DECODER_NAMES,
]
"""The official key names to ours, as rules for `re.sub`."""


class SentencePyramid(nn.Module):
    """Join three maps at stride 16; the sentence gates the coarsest, which then guides the finer ones."""

    def __init__(self, vision_dims: Sequence[int], sentence_dim: int, dims: Sequence[int]) -> None:
        """vision_dims: widths at strides 8, 16 and 32. dims: widths inside at the same strides; the output's is the
        middle one.
        """
        super().__init__()
        fine, middle, coarse = dims
        self.sentence = nn.Sequential(nn.Linear(sentence_dim, coarse, bias=False), nn.BatchNorm1d(coarse), nn.ReLU())
        self.coarse = conv_norm_relu(vision_dims[2], coarse)
        self.gated_norm = nn.BatchNorm2d(coarse)
        self.middle = conv_norm_relu(vision_dims[1], middle, 3)
        self.middle_join = conv_norm_relu(middle + coarse, middle)
        self.fine = conv_norm_relu(vision_dims[0], fine, 3)
        self.fine_join = conv_norm_relu(fine + middle, middle)
        self.levels = nn.ModuleList(conv_norm_relu(dim, middle, 3) for dim in (middle, middle, coarse))
        self.aggregate = conv_norm_relu(3 * middle, middle)
        self.locate = nn.Sequential(conv_norm_relu(middle + 2, middle, 3), conv_norm_relu(middle, middle, 3))

    def forward(self, maps: Sequence[Tensor], sentence: Tensor) -> Tensor:
        """Maps at strides 8, 16 and 32, sentence [B, E] -> [B, D, h, w] at stride 16."""
        fine, middle, coarse = maps
        if self.training and len(sentence) == 1:
            raise UserError(
                "CRIS normalises the sentence over the images of a micro batch, which needs at least 2 of them; set "
                "train.micro_batch_size (and train.global_batch_size) to 2 or more"
            )
        gate = self.sentence(sentence)[..., None, None]
        coarse = F.relu(self.gated_norm(self.coarse(coarse) * gate))
        middle = self.middle_join(torch.cat([self.middle(middle), _twice(coarse)], dim=1))
        fine = self.fine_join(torch.cat([F.avg_pool2d(self.fine(fine), 2), middle], dim=1))
        levels = [self.levels[0](fine), self.levels[1](middle), _twice(self.levels[2](coarse))]
        return self.locate(with_coordinates(self.aggregate(torch.cat(levels, dim=1))))


def _twice(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)


class CRIS(PixelTextModel):
    """CLIP ResNet and text, the pyramid and CRIS' decoder; one-channel logits at stride 4."""

    vision: CLIPResNet
    encodes_image_alone = True
    frame_stride = STRIDE

    def __init__(
        self,
        *,
        vision: CLIPResNet,
        text: CLIPText,
        pyramid_dims: Sequence[int] = (256, 512, 1024),
        layers: int = 3,
        heads: int = 8,
        feedforward: int = 2048,
        dropout: float = 0.1,
    ) -> None:
        """vision, text: built encoders of one shared space.

        pyramid_dims: widths at strides 8, 16 and 32; the middle one is the text's.
        layers, heads, feedforward, dropout: of the decoder.
        """
        super().__init__()
        self.vision, self.text = vision, text
        neck = SentencePyramid(vision.channels, text.embed_dim, pyramid_dims)
        self.add_decoder(neck, layers=layers, heads=heads, feedforward=feedforward, dropout=dropout)
        self.alignment_dims = (vision.channels[-1], text.embed_dim)

    def encode(self, batch: Batch) -> Features:
        """Maps at strides 8, 16 and 32 of the image padded to multiples of 32; `extra["sentence"]` is [B, E]."""
        return self.encode_with_image(batch, self.encode_image(batch.image))

    def encode_with_image(self, batch: Batch, image: tuple[Tensor, ...]) -> Features:
        tokens, sentence = self.text(batch.input_ids, batch.text_mask)
        return Features(image, tokens, batch.text_mask, {"sentence": sentence})

    def encode_image(self, image: Tensor) -> tuple[Tensor, ...]:
        return self.vision(self.padded(image))

    def alignment_features(
        self, batch: Batch, features: Features | None = None, *, text: str | None = None, visual: str | None = None
    ) -> AlignmentFeatures:
        """The pooled map [B, E, h, w] and the tokens in the shared space [B, L, E]."""
        features = self.encode(batch) if features is None else features
        shared = self.text.project(features.text)
        return AlignmentFeatures(features.visual[-1], shared, features.text_mask)

    def reencode_image(self, batch: Batch, features: Features) -> Features:
        return features._replace(visual=self.encode_image(batch.image))

    def param_groups(self, lr: float, weight_decay: float) -> list[dict[str, Any]]:
        """CLIP at a tenth of the rate, except its two position tables."""
        positions = [self.text.positional_embedding, self.vision.pool.pos_embed]
        clip = [
            p
            for part in (self.vision, self.text)
            for p in part.parameters()
            if p.requires_grad and all(p is not table for table in positions)
        ]
        rest = [p for part in (self.neck, self.decoder, self.head) for p in part.parameters()]
        return [
            {"name": "clip", "params": clip, "lr": lr * 0.1, "weight_decay": weight_decay},
            {"name": "rest", "params": [*positions, *rest], "lr": lr, "weight_decay": weight_decay},
        ]

    def convert_state_dict(self, official: Mapping[str, Tensor]) -> Conversion:
        return convert(official, self.state_dict(), renames=RENAMES)


def _info(size: int, tokenizer: str, max_tokens: int = 17) -> ModelInfo:
    return ModelInfo(
        paper="CRIS: CLIP-Driven Referring Image Segmentation (CVPR 2022)",
        official_code="github.com/DerrickWang005/CRIS.pytorch, commit e596332",
        licence="MIT",
        aml_scores="pooled stride-32 CLIP map x tokens in CLIP's shared space",
        preprocess=Preprocess(
            size=size,
            resize="letterbox",
            normalization="clip",
            tokenizer=tokenizer,
            max_tokens=max_tokens,
            sentence_field="sent",
        ),
        protocol=LETTERBOX_UNDONE,
        loss="binary_cross_entropy",
    )


@register_model(_info(416, "openai/clip-vit-base-patch16"))
def cris_r101(
    *,
    vision_weights: str | None = None,
    text_weights: str | None = None,
    vocab_size: int = 49408,
    dropout: float = 0.1,
) -> CRIS:
    """CLIP RN101: 161.3 M parameters. Both weights: RN101.pt; vision_weights also timm's resnet101_clip.openai."""
    vision = CLIPResNet(depths=(3, 4, 23, 3), embed_dim=512)
    text = CLIPText(vocab_size=vocab_size, embed_dim=512)
    _load(vision, text, vision_weights, text_weights)
    return CRIS(vision=vision, text=text, dropout=dropout)


@register_model(_info(416, "openai/clip-vit-base-patch16"))
def cris_r50(
    *,
    vision_weights: str | None = None,
    text_weights: str | None = None,
    vocab_size: int = 49408,
    dropout: float = 0.1,
) -> CRIS:
    """CLIP RN50: 146.8 M parameters. Both weights: RN50.pt; vision_weights also timm's resnet50_clip.openai."""
    vision = CLIPResNet(depths=(3, 4, 6, 3), embed_dim=1024)
    text = CLIPText(vocab_size=vocab_size, embed_dim=1024)
    _load(vision, text, vision_weights, text_weights)
    return CRIS(vision=vision, text=text, dropout=dropout)


@register_model(_info(96, "wordpiece", max_tokens=24))
def cris_tiny(
    *,
    vision_weights: str | None = None,
    text_weights: str | None = None,
    vocab_size: int = 512,
    dropout: float = 0.0,
) -> CRIS:
    """Small enough to learn synthetic scenes from scratch on two CPU cores."""
    vision = CLIPResNet(width=16, depths=(1, 2, 2, 1), embed_dim=128, table_size=3)
    text = CLIPText(width=64, layers=2, heads=4, vocab_size=vocab_size, max_positions=64, embed_dim=128)
    _load(vision, text, vision_weights, text_weights)
    return CRIS(
        vision=vision,
        text=text,
        pyramid_dims=(64, 64, 128),
        layers=2,
        heads=4,
        feedforward=128,
        dropout=dropout,
    )


def _load(vision: CLIPResNet, text: CLIPText, vision_weights: str | None, text_weights: str | None) -> None:
    if vision_weights is not None:
        load_clip_resnet(vision, vision_weights)
    if text_weights is not None:
        load_clip_text(text, text_weights)
