"""EVF-SAM: BEiT-3 reads image and words together, and its image token is the prompt of SAM or SAM 2.

Paper: Zhang et al., EVF-SAM: Early Vision-Language Fusion for Text-Prompted Segment Anything Model, 2024. Official
code: hustvl/EVF-SAM, commit 9935dc5 (Apache-2.0), for inference only; nobody published how it was trained.
Reimplemented with transformers' SAM modules; every recorded case is reproduced (tests/parity/evfsam.py).

Kept: the epsilons of SAM's decoder (1e-5, transformers has 1e-6); the image's first token of a sequence with words
after it as prompt; SAM's mask token 0; SAM 2's choice among tokens 1 to 3 by predicted IoU, in training too; SAM's
image encoder frozen, SAM 2 wholly; BEiT-3's image resized without antialiasing.

BEiT-3's picture is `Batch.view`, made from the original; a batch without one makes it from the network's input (values
differ by 0.01 to 0.03 on average). Its overshoots are cut, as it travels in 8 bits. EVF-SAM pads the shorter side of
SAM's picture and cuts that off its masks, EVF-SAM2 stretches it; so do the tiny ones.

Not kept: the loss is taken at the network's size, not at every
original's (on pictures of network size the two are the same). The parts of SAM that no mask is read from stay frozen.

Ours, because it was not published: the recipe (configs/models/evfsam_beit3_large.yaml).
Logits have the size of the image: they are enlarged with align_corners=False here, as the official code does.

What AML scores: the image alone x the words alone through BEiT-3, one more pass. SAM's map is not scored.

Dimensions: B batch, L text tokens, C encoder width, h w BEiT-3's grid, S side of SAM's input.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from amltrain.config.schema import Preprocess, Protocol
from amltrain.frames import VIEW_NORMALIZATION, renormalised
from amltrain.models.base import Conversion, RISModel, convert
from amltrain.models.beit3 import BEiT3Encoder, load_beit3
from amltrain.models.layers.basic import Tuning
from amltrain.models.layers.prompted_sam import OFFICIAL_DROPS, PromptedSAM, PromptedSAM2, sam_huge, sam_tiny
from amltrain.models.registry import ModelInfo, register_model
from amltrain.records import AlignmentFeatures, Batch, Features, ModelOutput

RENAMES = [
    (r"^(module\.)?mm_extractor\.beit3\.", "beit3."),
    (r"^(module\.)?text_hidden_fcs\.0\.", "projector."),
]
DROPS = [(r"(module\.)?mm_extractor\.beit3\.vision_embed\.mask_token", "pretraining's stand-in for hidden patches")]
PROTOCOL = Protocol(
    frame="original", threshold=0.5, interpolation="bilinear", sentences="all", ties="ge", mask_parts="exclusive"
)


class EVFSAM(RISModel):
    """BEiT-3, a projector and a SAM; one-channel logits at the image's size."""

    encoders = ("beit3",)
    mask_channels = 1
    encodes_image_alone = True
    mean: Tensor
    std: Tensor

    def __init__(
        self,
        beit3: BEiT3Encoder,
        sam: PromptedSAM,
        *,
        vision_tuning: Tuning = "frozen",
        train_decoder: bool = True,
        lora_rank: int = 16,
    ) -> None:
        """vision_tuning: how SAM's image encoder trains. train_decoder: whether SAM's mask decoder does."""
        super().__init__()
        self.beit3, self.sam = beit3, sam
        self.projector = nn.Sequential(nn.Linear(beit3.dim, beit3.dim), nn.ReLU(), nn.Linear(beit3.dim, sam.width))
        self.vision_tuning = vision_tuning
        sam.tune(vision_tuning, train_decoder, lora_rank)
        self.alignment_dims = self.fused_dims = (beit3.dim, beit3.dim)

    def train(self, mode: bool = True) -> "EVFSAM":
        super().train(mode)
        if self.vision_tuning == "frozen":
            self.sam.vision_encoder.train(False)
        return self

    def small_picture(self, batch: Batch) -> Tensor:
        """BEiT-3's picture [B, 3, s, s]: the batch's, or one from the network's input, bicubic, not antialiased."""
        if batch.view is not None:
            return renormalised(batch.view, VIEW_NORMALIZATION, "half")
        side = self.beit3.table_size * self.beit3.patch
        small = F.interpolate(batch.image, (side, side), mode="bicubic", align_corners=False)
        return renormalised(small, "imagenet", "half")

    def encode(self, batch: Batch) -> Features:
        return self.encode_with_image(batch, self.encode_image(batch.image))

    def encode_image(self, image: Tensor) -> tuple[Tensor, ...]:
        """Image [B, 3, H, W] -> SAM's maps, from fine to coarse."""
        return self._encode_sam(image)

    def encode_with_image(self, batch: Batch, image: tuple[Tensor, ...]) -> Features:
        """SAM's maps as `visual`, BEiT-3's words as `text`; extra: the prompt [B, D] and BEiT-3's map [B, C, h, w]."""
        visual, words, first = self.beit3.encode_together(self.small_picture(batch), batch.input_ids, batch.text_mask)[
            -1
        ]
        return Features(image, words, batch.text_mask, {"prompt": self.projector(first), "fused": visual})

    def decode(self, features: Features, batch: Batch) -> ModelOutput:
        """Logits [B, 1, H, W]; aux: low_resolution [B, 1, S/4, S/4], and BEiT-3's map and words."""
        low = self.sam(features.visual, features.extra["prompt"])
        exact = low.to(torch.promote_types(low.dtype, torch.float32))
        logits = F.interpolate(exact, batch.image.shape[-2:], mode="bilinear", align_corners=False)
        aux = {"low_resolution": low, "fused_visual": features.extra["fused"], "fused_text": features.text}
        return ModelOutput(logits, aux)

    def reencode_image(self, batch: Batch, features: Features) -> Features:
        """SAM's maps of another image; the prompt, which read the first one, is kept."""
        return features._replace(visual=self._encode_sam(batch.image))

    def alignment_features(
        self, batch: Batch, features: Features | None = None, *, text: str | None = None, visual: str | None = None
    ) -> AlignmentFeatures:
        """The image alone [B, C, h, w] and the words alone [B, L, C]; `features` have seen each other."""
        return self.beit3.encode_alone(self.small_picture(batch), batch.input_ids, batch.text_mask)

    def param_groups(self, lr: float, weight_decay: float) -> list[dict[str, Any]]:
        """One group, as far as it was published; the recipe has no weight decay."""
        trained = [p for p in self.parameters() if p.requires_grad]
        return [{"name": "all", "params": trained, "lr": lr, "weight_decay": weight_decay}]

    def convert_state_dict(self, official: Mapping[str, Tensor]) -> Conversion:
        renames = [*RENAMES, *self.sam.renames]
        return convert(official, self.state_dict(), renames=renames, drops=[*DROPS, *OFFICIAL_DROPS])

    def set_gradient_checkpointing(self, enabled: bool) -> None:
        self.beit3.gradient_checkpointing = enabled
        if self.vision_tuning != "frozen":
            self.sam.set_gradient_checkpointing(enabled)

    def _encode_sam(self, image: Tensor) -> tuple[Tensor, ...]:
        """Image [B, 3, H, W], resized to SAM's side where it has another -> SAM's maps, from fine to coarse."""
        side = (self.sam.image_size, self.sam.image_size)
        if image.shape[-2:] != side:
            image = F.interpolate(image, side, mode="bilinear", align_corners=False)
        return self.sam.encode(image)


def _build(
    encoder: BEiT3Encoder, sam: PromptedSAM, vision_weights: str | None, text_weights: str | None, **model: Any
) -> EVFSAM:
    if vision_weights is not None:
        sam.load(vision_weights)
    if text_weights is not None:
        load_beit3(encoder, text_weights)
    return EVFSAM(encoder, sam, **model)


def _info(size: int, tokenizer: str, max_tokens: int, *, padded: bool = False, view: int = 224) -> ModelInfo:
    return ModelInfo(
        paper="EVF-SAM: Early Vision-Language Fusion for Text-Prompted Segment Anything Model (2024)",
        official_code="github.com/hustvl/EVF-SAM, commit 9935dc5",
        licence="Apache-2.0; its BEiT-3 encoder MIT",
        aml_scores="the image alone x the words alone through BEiT-3",
        preprocess=Preprocess(
            size=size,
            resize="longest" if padded else "square",
            view_size=view,
            view="bicubic",
            normalization="imagenet",
            tokenizer=tokenizer,
            max_tokens=max_tokens,
            sentence_field="sent",
        ),
        protocol=replace(PROTOCOL, interpolation="cropped") if padded else PROTOCOL,
        loss="cross_entropy_dice",
        loss_kwargs={"smoothing": 1e-3},
    )


def _beit3_large(vocab_size: int) -> BEiT3Encoder:
    return BEiT3Encoder(dim=1024, depth=24, heads=16, vocab_size=max(vocab_size, 64010))


@register_model(_info(1024, "YxZhang/evf-sam", 64, padded=True))
def evfsam_beit3_large(
    *,
    vision_weights: str | None = None,
    text_weights: str | None = None,
    vocab_size: int = 64010,
    vision_tuning: Tuning = "frozen",
    lora_rank: int = 16,
) -> EVFSAM:
    """BEiT-3 large and SAM ViT-H at 1024 pixels.

    vision_weights: SAM's: facebook/sam-vit-huge, or the official file. text_weights: BEiT-3's file
    (beit3_large_patch16_224.pth), of which image and words are used.
    """
    encoder = _beit3_large(vocab_size)
    return _build(encoder, sam_huge(), vision_weights, text_weights, vision_tuning=vision_tuning, lora_rank=lora_rank)


@register_model(_info(1024, "YxZhang/evf-sam", 64))
def evfsam2_beit3_large(
    *,
    vision_weights: str | None = None,
    text_weights: str | None = None,
    vocab_size: int = 64010,
    vision_tuning: Tuning = "frozen",
    train_decoder: bool = False,
    lora_rank: int = 16,
) -> EVFSAM:
    """BEiT-3 large and SAM 2 Hiera-L at 1024 pixels.

    vision_weights: SAM 2's: facebook/sam2-hiera-large, or the official file. text_weights: as in `evfsam_beit3_large`.
    train_decoder: the official one is frozen, so that it keeps what it can do with videos.
    """
    sam = sam2(
        hidden=144,
        blocks=[2, 6, 36, 4],
        heads=2,
        windows=[8, 4, 16, 8],
        whole=[23, 33, 43],
    )
    tuning = {"vision_tuning": vision_tuning, "train_decoder": train_decoder, "lora_rank": lora_rank}
    return _build(_beit3_large(vocab_size), sam, vision_weights, text_weights, **tuning)


def sam2(
    *,
    hidden: int,
    blocks: list[int],
    heads: int,
    windows: list[int],
    whole: list[int],
    size: int = 1024,
    background: int = 7,
    width: int = 256,
    decoder_heads: int = 8,
    decoder_mlp: int = 2048,
    iou_hidden: int = 256,
) -> PromptedSAM2:
    """SAM 2 for single images. hidden, heads: of the first of four stages, doubled in each; whole: blocks whose
    attention is global; background: side of the position table that is enlarged; the rest is the mask decoder's.
    """
    from transformers.models.sam2.configuration_sam2 import Sam2MaskDecoderConfig, Sam2VisionConfig

    widths = [hidden * 2**stage for stage in range(4)]
    backbone = {
        "model_type": "sam2_hiera_det_model",
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "blocks_per_stage": blocks,
        "embed_dim_per_stage": widths,
        "num_attention_heads_per_stage": [heads * 2**stage for stage in range(4)],
        "window_size_per_stage": windows,
        "global_attention_blocks": whole,
        "image_size": [size, size],
        "window_positional_embedding_background_size": [background, background],
    }
    vision = Sam2VisionConfig(
        backbone_config=backbone,
        backbone_channel_list=widths[::-1],
        backbone_feature_sizes=[[size // stride] * 2 for stride in (4, 8, 16)],
        fpn_hidden_size=width,
    )
    decoder = Sam2MaskDecoderConfig(
        hidden_size=width, mlp_dim=decoder_mlp, num_attention_heads=decoder_heads, iou_head_hidden_dim=iou_hidden
    )
    return PromptedSAM2(vision, decoder)


def _beit3_tiny(vocab_size: int, drop_path_rate: float) -> BEiT3Encoder:
    return BEiT3Encoder(
        dim=96,
        depth=4,
        heads=4,
        patch=8,
        table_size=12,
        vocab_size=vocab_size,
        text_positions=66,
        drop_path=drop_path_rate,
    )


@register_model(_info(96, "wordpiece", 24, view=96))
def evfsam_tiny(
    *,
    vision_weights: str | None = None,
    text_weights: str | None = None,
    vocab_size: int = 512,
    drop_path_rate: float = 0.0,
) -> EVFSAM:
    """A small EVF-SAM, fully trained, that learns synthetic scenes from scratch; 96 pixels."""
    encoder = _beit3_tiny(vocab_size, drop_path_rate)
    return _build(encoder, sam_tiny(), vision_weights, text_weights, vision_tuning="full")


@register_model(_info(96, "wordpiece", 24, view=96))
def evfsam2_tiny(
    *,
    vision_weights: str | None = None,
    text_weights: str | None = None,
    vocab_size: int = 512,
    drop_path_rate: float = 0.0,
) -> EVFSAM:
    """A small EVF-SAM2, fully trained, that learns synthetic scenes from scratch; 96 pixels."""
    sam = sam2(
        hidden=16,
        blocks=[1, 1, 2, 1],
        heads=1,
        windows=[8, 4, 6, 3],
        whole=[3],
        size=96,
        width=64,
        decoder_heads=4,
        decoder_mlp=128,
        iou_hidden=64,
    )
    encoder = _beit3_tiny(vocab_size, drop_path_rate)
    return _build(encoder, sam, vision_weights, text_weights, vision_tuning="full")
