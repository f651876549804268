"""Dual: any image model of timm and any text model of transformers, which meet in CARIS's decoder only.

No paper: a baseline for encoders that are newer than the papers of the registry. The decoder is the one of `caris.py`,
without its image prompts, so that both encoders run alone and either can be replaced, frozen or encoded once.
A hierarchical image model gives the decoder's four levels; a plain one (ViT) gives four of its blocks, which a pyramid
brings to 4x, 2x, 1x and half their resolution, as in ViTDet (Li et al., ECCV 2022) but from blocks of rising depth.

What AML scores: `alignment="features"`: the last map and the last token features, neither of which has seen the other
modality; `alignment="shared"`: both after the encoders' own pretrained heads, each patch and each token alone, for
encoders trained together (CLIP, SigLIP 2, EVA-02-CLIP, TIPSv2). Their widths are equal, so `aml.projection: identity`
compares them as pretraining did, by cosine. TIPSv2 has no heads: its patches and tokens lie in the space as they are.

Dimensions: B batch, L text tokens, C width of a map, S width of the shared space.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch.nn.functional as F
from torch import Tensor, nn

from amltrain.config.schema import Preprocess
from amltrain.environment import PACKAGED
from amltrain.errors import UserError
from amltrain.models.backbones.text import (
    TextModel,
    build_text_model,
    load_packaged_minilm,
    load_packaged_vision,
    load_text_model,
)
from amltrain.models.backbones.timm_vision import Normalization, TimmVision, load_timm_vision
from amltrain.models.base import Conversion, RISModel, convert
from amltrain.models.layers.basic import Tuning, tune
from amltrain.models.layers.cris_decoder import at_image_size
from amltrain.models.layers.fusion_decoder import FusionDecoder
from amltrain.models.registry import NETWORK_FRAME, ModelInfo, register_model
from amltrain.records import AlignmentFeatures, Batch, Features, ModelOutput

Alignment = Literal["features", "shared"]
UNDECAYED = ("norm", "embed", "token", "bias_table", "prompts", "level_encoding")


class PlainPyramid(nn.Module):
    """Four maps of one stride -> maps at 4x, 2x, 1x and half their resolution."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.channels = [dim // 4, dim // 2, dim, dim]
        self.fine = nn.Sequential(
            nn.ConvTranspose2d(dim, dim // 2, 2, stride=2),
            nn.GroupNorm(1, dim // 2),
            nn.GELU(),
            nn.ConvTranspose2d(dim // 2, dim // 4, 2, stride=2),
        )
        self.middle = nn.ConvTranspose2d(dim, dim // 2, 2, stride=2)

    def forward(self, maps: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """maps: four [B, C, h, w] from early to deep, h and w even -> four maps from fine to coarse."""
        return self.fine(maps[0]), self.middle(maps[1]), maps[2], F.avg_pool2d(maps[3], 2)


class Dual(RISModel):
    """Two independent encoders and the fusion decoder; two-channel logits at stride 4 (a quarter of a ViT's patch)."""

    encoders = ("vision", "text")
    mask_channels = 2
    supports_suppression = True
    encodes_image_alone = True

    def __init__(
        self,
        *,
        vision: TimmVision,
        text: TextModel,
        dim: int = 256,
        layers: int = 6,
        heads: int = 8,
        alignment: Alignment = "features",
        vision_tuning: Tuning = "full",
        text_tuning: Tuning = "full",
        lora_rank: int = 16,
        encoder_lr_scale: float = 0.1,
    ) -> None:
        """vision, text: built encoders with their weights. dim: decoder width, a multiple of 32. layers, heads: of it.

        vision_tuning, text_tuning: train an encoder whole, by low-rank updates of its linear layers (lora), or not.
        encoder_lr_scale: what the encoders' learning rate is multiplied by; low-rank updates get the full one.
        Raises UserError for `alignment="shared"` of encoders that have no shared space.
        """
        super().__init__()
        self.alignment = alignment
        if alignment == "shared":
            self.alignment_dims = _shared_dims(vision, text)
        else:
            self.alignment_dims = (vision.channels[-1], text.hidden_size)
        self.vision, self.text = vision, text
        self.pyramid = PlainPyramid(vision.channels[-1]) if vision.plain else None
        channels = vision.channels if self.pyramid is None else self.pyramid.channels
        self.decoder = FusionDecoder(channels, text.hidden_size, dim=dim, layers=layers, heads=heads)
        self.fused_dims = (dim, dim)
        self.tunings: dict[str, Tuning] = {"vision": vision_tuning, "text": text_tuning}
        self.encoder_lr_scale = encoder_lr_scale
        tune(self.vision, vision_tuning, lora_rank)
        tune(self.text, text_tuning, lora_rank)
        self.alignment_is_frozen = vision_tuning == text_tuning == "frozen"

    def train(self, mode: bool = True) -> "Dual":
        """A frozen encoder stays in evaluation mode: its batch norms keep their averages, and nothing is dropped."""
        super().train(mode)
        for part, tuning in self.tunings.items():
            if tuning == "frozen":
                getattr(self, part).train(False)
        return self

    def encode(self, batch: Batch) -> Features:
        return self.encode_with_image(batch, self.encode_image(batch.image))

    def encode_image(self, image: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.vision(image))

    def encode_with_image(self, batch: Batch, image: tuple[Tensor, ...]) -> Features:
        return Features(image, self.text(batch.input_ids, batch.text_mask), batch.text_mask)

    def decode(self, features: Features, batch: Batch) -> ModelOutput:
        visual = features.visual if self.pyramid is None else self.pyramid(features.visual)
        output = self.decoder(features._replace(visual=visual))
        size = (batch.image.shape[-2], batch.image.shape[-1])
        return output._replace(logits=at_image_size(output.logits, size, self.vision.stride))

    def alignment_features(
        self, batch: Batch, features: Features | None = None, *, text: str | None = None, visual: str | None = None
    ) -> AlignmentFeatures:
        found = super().alignment_features(batch, features)
        if self.alignment == "features":
            return found
        return AlignmentFeatures(self.vision.project(found.visual), self.text.project(found.text), found.text_mask)

    def reencode_image(self, batch: Batch, features: Features) -> Features:
        return features._replace(visual=self.vision(batch.image))

    def param_groups(self, lr: float, weight_decay: float) -> list[dict[str, Any]]:
        """Encoders at their own rate; norms, embeddings, prompts, biases and other vectors do not decay."""
        groups: dict[str, dict[str, Any]] = {}
        for name, parameter in self.named_parameters():
            if not parameter.requires_grad:
                continue
            part = name.split(".")[0]
            kind = part if part in self.tunings else "rest"
            scale = self.encoder_lr_scale if self.tunings.get(part) == "full" else 1.0
            decays = parameter.ndim > 1 and not any(word in name.lower() for word in UNDECAYED)
            group = groups.setdefault(
                f"{kind}_{'decay' if decays else 'no_decay'}",
                {"params": [], "lr": lr * scale, "weight_decay": weight_decay if decays else 0.0},
            )
            group["params"].append(parameter)
        return [{"name": name, **group} for name, group in groups.items()]

    def convert_state_dict(self, official: Mapping[str, Tensor]) -> Conversion:
        """Accept only files with this model's own key names: there is no official code."""
        return convert(official, self.state_dict())

    def set_gradient_checkpointing(self, enabled: bool) -> None:
        self.vision.set_gradient_checkpointing(enabled)
        self.text.set_gradient_checkpointing(enabled)


def _shared_dims(vision: TimmVision, text: TextModel) -> tuple[int, int]:
    if vision.head_dim is None or text.shared_dim is None or vision.head_dim != text.shared_dim:
        raise UserError(
            f"alignment=shared needs encoders that were trained together; these heads are {vision.head_dim} (image) "
            f"and {text.shared_dim} (text) wide: name a pair with one space, or set model.kwargs.alignment to features"
        )
    return vision.head_dim, text.shared_dim


def _build(
    vision: str,
    text: str,
    *,
    vision_weights: str | None,
    text_weights: str | None,
    vision_options: dict[str, Any] | None,
    text_options: dict[str, Any] | None,
    vocab_size: int,
    normalization: Normalization,
    alignment: Alignment,
    **model: Any,
) -> Dual:
    image_encoder = TimmVision(vision, vision_options, normalization=normalization, keep_head=alignment == "shared")
    text_encoder = build_text_model(text, text_options, vocab_size=vocab_size)
    if vision_weights == PACKAGED:
        load_packaged_vision(image_encoder, vision)
    elif vision_weights is not None:
        load_timm_vision(image_encoder, vision_weights)
    if text_weights == PACKAGED:
        load_packaged_minilm(text_encoder)
    elif text_weights is not None:
        load_text_model(text_encoder, text_weights)
    return Dual(vision=image_encoder, text=text_encoder, alignment=alignment, **model)


def _info(
    size: int,
    tokenizer: str,
    max_tokens: int,
    normalization: Literal["imagenet", "clip", "half"],
    *,
    official_code: str,
    licence: str,
    shared: bool,
) -> ModelInfo:
    scored = "every patch and every token after the encoders' own heads, in their shared space"
    return ModelInfo(
        paper="none: any timm image model and any transformers text model with CARIS's decoder",
        official_code=official_code,
        licence=licence,
        aml_scores=scored if shared else "last image map x last token features, both without the other modality",
        preprocess=Preprocess(
            size=size,
            resize="square",
            normalization=normalization,
            tokenizer=tokenizer,
            max_tokens=max_tokens,
            sentence_field="sent",
        ),
        protocol=NETWORK_FRAME,
        loss="weighted_cross_entropy",
        loss_kwargs={"background_weight": 0.9, "referent_weight": 1.1},
    )


@register_model(
    _info(
        448,
        "bert-base-uncased",
        22,
        "imagenet",
        official_code="no official code; encoders: DINOv3 (timm), BERT (transformers)",
        licence="ours Apache-2.0; DINOv3's weights under Meta's DINOv3 License, which restricts uses",
        shared=False,
    )
)
def dual_dinov3_base(
    *,
    vision: str = "vit_base_patch16_dinov3.lvd1689m",
    text: str = "bert-base-uncased",
    vision_weights: str | None = None,
    text_weights: str | None = None,
    vision_options: dict[str, Any] | None = None,
    text_options: dict[str, Any] | None = None,
    vocab_size: int = 30522,
    normalization: Normalization = "imagenet",
    alignment: Alignment = "features",
    vision_tuning: Tuning = "full",
    text_tuning: Tuning = "full",
    lora_rank: int = 16,
) -> Dual:
    """DINOv3 ViT-B/16 and BERT-base; any other pair by `vision` and `text`.

    vision: name in timm. text: see `build_text_model`; set preprocess.tokenizer to its tokenizer as well.
    vision_weights, text_weights: a name, an id, a folder or a file; None = random.
    vision_options, text_options: arguments of `timm.create_model`, fields of the text model's config.json.
    normalization: what preprocess.normalization is; images are changed to what the image model was trained with.
    """
    return _build(**locals())


@register_model(
    _info(
        448,
        "google/siglip2-base-patch16-256",
        64,
        "half",
        official_code="no official code; encoders: SigLIP 2 (timm and transformers)",
        licence="ours Apache-2.0; SigLIP 2's weights Apache-2.0",
        shared=True,
    )
)
def dual_siglip2_base(
    *,
    vision: str = "vit_base_patch16_siglip_256.v2_webli",
    text: str = "google/siglip2-base-patch16-256",
    vision_weights: str | None = None,
    text_weights: str | None = None,
    vision_options: dict[str, Any] | None = None,
    text_options: dict[str, Any] | None = None,
    vocab_size: int = 256000,
    normalization: Normalization = "half",
    alignment: Alignment = "shared",
    vision_tuning: Tuning = "full",
    text_tuning: Tuning = "full",
    lora_rank: int = 16,
) -> Dual:
    """SigLIP 2 B/16 with both of its encoders, whose heads AML compares; arguments as in `dual_dinov3_base`.

    Sentences are padded to 64 tokens, which SigLIP reads, as in its training.
    """
    return _build(**locals())


@register_model(
    _info(
        448,
        "openai/clip-vit-base-patch16",
        22,
        "clip",
        official_code="no official code; encoders: EVA-02-CLIP (timm; its text model in transformers)",
        licence="ours Apache-2.0; EVA-02-CLIP's weights MIT",
        shared=True,
    )
)
def dual_eva02_base(
    *,
    vision: str = "eva02_base_patch16_clip_224.merged2b",
    text: str = "QuanSun/EVA-CLIP-B-16",
    vision_weights: str | None = None,
    text_weights: str | None = None,
    vision_options: dict[str, Any] | None = None,
    text_options: dict[str, Any] | None = None,
    vocab_size: int = 49408,
    normalization: Normalization = "clip",
    alignment: Alignment = "shared",
    vision_tuning: Tuning = "full",
    text_tuning: Tuning = "full",
    lora_rank: int = 16,
) -> Dual:
    """EVA-02-CLIP B/16 with both of its encoders, whose heads AML compares; arguments as in `dual_dinov3_base`.

    text_weights: the official file with both encoders (EVA02_CLIP_B_psz16_s8B.pt), of which the text model is taken.
    """
    return _build(**locals())


@register_model(
    _info(
        448,
        "google/tipsv2-b14",
        64,
        "half",
        official_code="no official code; encoders: TIPSv2 (timm and transformers)",
        licence="ours Apache-2.0; TIPSv2's weights Apache-2.0",
        shared=True,
    )
)
def dual_tipsv2_base(
    *,
    vision: str = "vit_base_patch14_reg1_tipsv2.webli",
    text: str = "google/tipsv2-b14",
    vision_weights: str | None = None,
    text_weights: str | None = None,
    vision_options: dict[str, Any] | None = None,
    text_options: dict[str, Any] | None = None,
    vocab_size: int = 32000,
    normalization: Normalization = "half",
    alignment: Alignment = "shared",
    vision_tuning: Tuning = "full",
    text_tuning: Tuning = "full",
    lora_rank: int = 16,
) -> Dual:
    """TIPSv2 B/14 with both of its encoders, which AML compares as they are; arguments as in `dual_dinov3_base`.

    At most 64 tokens, the length of its training. Its image model reads pixels 0..1, to which it changes its input.
    """
    return _build(**locals())


@register_model(
    _info(
        320,
        "bert-base-uncased",
        22,
        "imagenet",
        official_code="no official code; encoders: EfficientNet-Lite0 (timm), all-MiniLM-L6-v2 (transformers)",
        licence="ours Apache-2.0; weights: EfficientNet-Lite0 Apache-2.0 (its package's LICENSE), MiniLM: the package "
        "names none, upstream publishes it as Apache-2.0",
        shared=False,
    )
)
def caris_lite(
    *,
    vision: str = "tf_efficientnet_lite0",
    text: str = "sentence-transformers/all-MiniLM-L6-v2",
    vision_weights: str | None = None,
    text_weights: str | None = None,
    vision_options: dict[str, Any] | None = None,
    text_options: dict[str, Any] | None = None,
    vocab_size: int = 30522,
    normalization: Normalization = "imagenet",
    alignment: Alignment = "features",
    vision_tuning: Tuning = "full",
    text_tuning: Tuning = "full",
    lora_rank: int = 16,
    dim: int = 128,
    layers: int = 3,
    heads: int = 8,
) -> Dual:
    """EfficientNet-Lite0, MiniLM and a small CARIS decoder: pretrained, yet trainable on a CPU.

    vision_weights, text_weights: `packaged` takes those that the extra `pretrained-lite` installs, without the Hub;
    else as in `dual_dinov3_base`. dim, layers, heads: of the decoder.
    """
    return _build(**locals())


@register_model(
    _info(
        96,
        "wordpiece",
        24,
        "imagenet",
        official_code="no official code",
        licence="ours Apache-2.0",
        shared=True,
    )
)
def dual_tiny(
    *,
    vision_weights: str | None = None,
    text_weights: str | None = None,
    vocab_size: int = 512,
    alignment: Alignment = "shared",
    dropout: float = 0.0,
    vision_tuning: Tuning = "full",
    text_tuning: Tuning = "full",
    lora_rank: int = 4,
) -> Dual:
    """A small CLIP (ViT with patches of 12 pixels, heads of width 64) that learns synthetic scenes from scratch."""
    return _build(
        "vit_tiny_patch16_224",
        "clip_text_model",
        vision_options={
            "img_size": 96,
            "patch_size": 12,
            "embed_dim": 128,
            "depth": 4,
            "num_heads": 4,
            "num_classes": 64,
            "drop_path_rate": dropout,
        },
        text_options={
            "hidden_size": 128,
            "intermediate_size": 512,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "projection_dim": 64,
            "vocab_size": vocab_size,
            "bos_token_id": 2,
            "eos_token_id": 3,
            "attention_dropout": dropout,
        },
        vision_weights=vision_weights,
        text_weights=text_weights,
        vocab_size=vocab_size,
        normalization="imagenet",
        alignment=alignment,
        dim=64,
        layers=3,
        heads=4,
        vision_tuning=vision_tuning,
        text_tuning=text_tuning,
        lora_rank=lora_rank,
        encoder_lr_scale=1.0,
    )
