"""DeRIS: one branch sees precisely (Swin, Mask2Former's queries), one understands (BEiT-3), and they loop back.

Paper: Dai et al., DeRIS: Decoupling Perception and Cognition for Enhanced Referring Image Segmentation through Loopback
Synergy, ICCV 2025. Official code: Dmmm1997/DeRIS, commit 2406687 (MIT). Reimplemented; the recorded tensors of the
official code are reproduced, matching and losses included (tests/parity/deris.py).

Queries, equal for every sentence at the start, predict a mask and whether the sentence means it. The mask is the union
of the queries whose score exceeds a threshold; no such query = the sentence means nothing here.

Kept, because the released weights were trained with it:
- In the loopback a query attends to the same query of the other samples of the batch (`mixing: batch`), so a result
  depends on its neighbours; a batch of one differs. `queries` is what was meant, `alone` needs no batch.
- The words' position code has lost its frequencies (`collapsed_code`); the pixel decoder has a ReLU and biases that
  Mask2Former's has not; Swin is frozen, but its drop path is active in training (`swin_drop_path_rate: 0` ends that).
- Both images are normalised with ImageNet's statistics.

Not kept: the box head, whose loss has weight 0, and heads without effect. BEiT-3's picture is `Batch.view`, made from
the original; a batch without one makes it from the network's input. Points of the loss are functions of the sample's
key, not of a global generator. Sentences of other images as "no target" are the augmentation `other_sentence`. The
perception branch starts from Mask2Former, as the official one, or from a Swin file.

Referents one by one (gRefCOCO) are `Batch.instances`; where the data lack them, the target mask is the only referent.

What AML scores: the image alone x the words alone through BEiT-3, one more pass.

Dimensions: B batch, L text tokens, Q queries, C decoder width, D BEiT-3's width, h w the map of stride 4.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from amltrain.config.schema import Preprocess
from amltrain.frames import VIEW_NORMALIZATION, renormalised
from amltrain.matching import enlarge_masks
from amltrain.models.backbones.mask2former import load_mask2former
from amltrain.models.backbones.swin import Swin
from amltrain.models.backbones.weights import is_file, load_swin
from amltrain.models.base import Conversion, RISModel, convert
from amltrain.models.beit3 import BEiT3Encoder, load_beit3
from amltrain.models.layers.deformable import PixelDecoder
from amltrain.models.layers.loopback_decoder import LoopbackDecoder, Mixing
from amltrain.models.layers.query_reader import OFFICIAL_READER_NAMES, Reader
from amltrain.models.registry import NETWORK_FRAME, ModelInfo, register_model
from amltrain.records import AlignmentFeatures, Batch, Features, ModelOutput

STRIDE = 32
_COGNITION, _PERCEPTION = r"^(module\.)?understanding_branch\.", r"^(module\.)?perception_branch\."
_PREDICTOR = _PERCEPTION + r"predictor\."
RENAMES = [
    (_COGNITION + r"vis_enc\.beit3\.", "beit3."),
    (_COGNITION + r"roialigner\.TextCorrelation\.", "aligner."),
    (_COGNITION + r"vis_embed\.", "image."),
    (_COGNITION + r"text_embed\.", "words."),
    (_COGNITION + r"perception_embed\.", "queries."),
    (_COGNITION + r"init_query\.", "start."),
    (_COGNITION + r"nt_embed\.", "existence."),
    (_PERCEPTION + r"hier_vision_encoder\.", "swin."),
    (_PERCEPTION + r"pixel_decoder\.transformer\.encoder\.", "pixel_decoder."),
    (_PERCEPTION + r"pixel_decoder\.transformer\.", "pixel_decoder."),
    (_PERCEPTION + r"pixel_decoder\.adapter_1\.", "pixel_decoder.lateral."),
    (_PERCEPTION + r"pixel_decoder\.layer_1\.", "pixel_decoder.merge."),
    (_PERCEPTION + r"pixel_decoder\.", "pixel_decoder."),
    (_PREDICTOR + r"transformer_cross_attention_layers\.(\d)\.multihead_attn\.", r"predictor.read_image.\2.attention."),
    (_PREDICTOR + r"transformer_cross_attention_layers\.", "predictor.read_image."),
    (_PREDICTOR + r"transformer_self_attention_layers\.(\d)\.self_attn\.", r"predictor.read_queries.\2.attention."),
    (_PREDICTOR + r"transformer_self_attention_layers\.", "predictor.read_queries."),
    (_PREDICTOR + r"transformer_ffn_layers\.", "predictor.feedforward."),
    (_PREDICTOR + r"query_SA\.(\d)\.self_attn\.", r"predictor.loops.\2.mix.attention."),
    (_PREDICTOR + r"query_SA\.(\d)\.", r"predictor.loops.\2.mix."),
    (_PREDICTOR + r"Q2TCA\.(\d)\.", r"predictor.loops.\2.words."),
    (_PREDICTOR + r"refer_proj\.(\d)\.", r"predictor.loops.\2.join."),
    (_PREDICTOR + r"decoder_norm\.", "predictor.norm."),
    (_PREDICTOR + r"SEG_cls\.", "predictor.refer."),
    (_PREDICTOR + r"channel_proj_conv\.", "predictor.fuse."),
    (_PREDICTOR, "predictor."),
    *OFFICIAL_READER_NAMES,
]
_ANY = r"(module\.)?(understanding|perception)_branch\."
DROPS = [
    (_ANY + r"vis_enc\.beit3\.vision_embed\.mask_token", "pretraining's stand-in for hidden patches"),
    (_ANY + r"hier_vision_encoder\..*\.relative_position_index", "an index table, recomputed from the window size"),
    (_ANY + r"predictor\.box_embed\..*", "a box head whose loss has weight 0"),
    (_ANY + r"(predictor\.(cls_embed|SEG_proj)|logit_embed)\..*", "a head without effect"),
    (_ANY + r"predictor\.Q2TCA\.\d\.cross_attn\.mapmlp\..*", "without effect"),
    (r"(module\.)?perception_branch\.(nt_embed|perception_query_embed)\..*", "without effect"),
    (r"(module\.)?head\.criterion\.empty_weight", "a constant of the loss"),
]


class BiasedPixelDecoder(PixelDecoder):
    """Mask2Former's pixel decoder with a bias in the two convolutions at stride 4 and a ReLU after the first."""

    def __init__(self, in_dims: tuple[int, ...], **sizes: int) -> None:
        super().__init__(in_dims, **sizes)
        dim = self.mask_features.in_channels
        self.lateral = nn.Sequential(nn.Conv2d(in_dims[0], dim, 1), nn.GroupNorm(32, dim), nn.ReLU())
        self.merge = nn.Sequential(nn.Conv2d(dim, dim, 3, padding=1), nn.GroupNorm(32, dim), nn.ReLU())
        self.reset_parameters()


class DeRIS(RISModel):
    """Swin and queries, BEiT-3, and an aligner; one-channel logits at the image's size and a no-target decision."""

    encoders = ("beit3", "swin")
    mask_channels = 1
    needs_instances = True
    encodes_image_alone = True

    def __init__(
        self,
        beit3: BEiT3Encoder,
        swin: Swin,
        pixel_decoder: BiasedPixelDecoder,
        predictor: LoopbackDecoder,
        *,
        aligner_feedforward: int = 512,
        aligner_dropout: float = 0.1,
        score_threshold: float = 0.7,
        train_swin: bool = False,
        encoder_lr_scale: float = 0.5,
    ) -> None:
        """score_threshold: a query is meant if its score exceeds it. encoder_lr_scale: multiplies BEiT-3's rate."""
        super().__init__()
        dim, queries = predictor.norm.normalized_shape[0], predictor.query_embed.num_embeddings
        self.beit3, self.swin, self.pixel_decoder, self.predictor = beit3, swin, pixel_decoder, predictor
        self.image, self.words, self.queries = (nn.Linear(beit3.dim, dim) for _ in range(3))
        self.start = nn.Embedding(queries, beit3.dim)
        self.aligner = Reader(dim, 8, aligner_feedforward, 3, aligner_dropout)
        self.existence = nn.Linear(dim, 1)
        self.swin.requires_grad_(train_swin)
        self.score_threshold, self.encoder_lr_scale = score_threshold, encoder_lr_scale
        self.alignment_dims, self.fused_dims = (beit3.dim, beit3.dim), (dim, dim)

    def small_picture(self, batch: Batch) -> Tensor:
        """BEiT-3's picture [B, 3, s, s]: the batch's, or one from the network's input, bilinear, not antialiased."""
        if batch.view is not None:
            return renormalised(batch.view, VIEW_NORMALIZATION, "imagenet")
        side = self.beit3.table_size * self.beit3.patch
        return F.interpolate(_padded(batch.image), (side, side), mode="bilinear", align_corners=False)

    def encode(self, batch: Batch) -> Features:
        return self.encode_with_image(batch, self.encode_image(batch.image))

    def encode_image(self, image: Tensor) -> tuple[Tensor, ...]:
        """Image [B, 3, H, W], padded to multiples of 32 -> mask features at stride 4, maps at strides 8, 16 and 32."""
        return self._perceive(_padded(image))

    def encode_with_image(self, batch: Batch, image: tuple[Tensor, ...]) -> Features:
        """The perception branch's maps as `visual`; BEiT-3's words [B, L, C] as `text`, its map in extra["image"]."""
        visual, words, _ = self.beit3.encode_together(self.small_picture(batch), batch.input_ids, batch.text_mask)[-1]
        understood = self.image(visual.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return Features(image, self.words(words), batch.text_mask, {"image": understood})

    def decode(self, features: Features, batch: Batch) -> ModelOutput:
        """Logits [B, 1, H, W]; aux: masks0.. [B, Q, h, w] at stride 4 and refer0.. [B, Q, 2] of every step, existence
        [B, 1], no_target [B, 2], fused features.
        """
        mask_features, *scales = features.visual
        count = mask_features.shape[0]
        start = self.queries(self.start.weight).expand(count, -1, -1)
        understood = features.extra["image"]
        queries, predictions = self.predictor(
            start, mask_features, scales[::-1], understood, features.text, features.text_mask
        )
        existence = self.existence(self.aligner(queries, features.text, padding=~features.text_mask)).mean(dim=1)
        size = (batch.image.shape[-2], batch.image.shape[-1])
        logits, no_target = self.union(enlarge_masks(predictions[-1].masks, size), predictions[-1].refer)
        aux = {"existence": existence, "no_target": no_target, "fused_visual": understood, "fused_text": features.text}
        for step, prediction in enumerate(predictions):
            aux |= {f"masks{step}": prediction.masks, f"refer{step}": prediction.refer}
        return ModelOutput(logits, aux)

    def union(self, masks: Tensor, refer: Tensor) -> tuple[Tensor, Tensor]:
        """Masks [B, Q, H, W], refer [B, Q, 2] logits -> logits [B, 1, H, W] and no-target logits [B, 2].

        A pixel's logit is at least 0 where a query that is meant has it in its mask: "and" is the smaller of both
        logits, "or" the largest of all queries. So a pixel is not merely in or out, and every query has a gradient.
        """
        margin = refer[..., 0] - refer[..., 1] - math.log(self.score_threshold / (1 - self.score_threshold))
        logits = torch.minimum(masks, margin[..., None, None].to(masks.dtype)).amax(dim=1, keepdim=True)
        best = margin.amax(dim=1, keepdim=True)
        return logits, torch.cat([best, torch.zeros_like(best)], dim=1)

    def reencode_image(self, batch: Batch, features: Features) -> Features:
        """The perception branch sees another image; what was understood of the first one is kept."""
        return features._replace(visual=self._perceive(_padded(batch.image)))

    def alignment_features(
        self, batch: Batch, features: Features | None = None, *, text: str | None = None, visual: str | None = None
    ) -> AlignmentFeatures:
        """The image alone [B, D, h', w'] and the words alone [B, L, D] through BEiT-3."""
        return self.beit3.encode_alone(self.small_picture(batch), batch.input_ids, batch.text_mask)

    def param_groups(self, lr: float, weight_decay: float) -> list[dict[str, Any]]:
        """BEiT-3 at half the rate, Swin, if it trains, at a tenth; the official recipe has no weight decay."""
        scales = {"beit3": self.encoder_lr_scale, "swin": 0.1, "pixel_decoder": 1.0, "head": 1.0}
        groups: dict[str, list[nn.Parameter]] = {}
        for name, parameter in self.named_parameters():
            part = name.split(".")[0]
            if parameter.requires_grad:
                groups.setdefault(part if part in scales else "head", []).append(parameter)
        return [
            {"name": name, "params": params, "lr": lr * scales[name], "weight_decay": weight_decay}
            for name, params in groups.items()
        ]

    def convert_state_dict(self, official: Mapping[str, Tensor]) -> Conversion:
        return convert(official, self.state_dict(), renames=RENAMES, drops=DROPS)

    def set_gradient_checkpointing(self, enabled: bool) -> None:
        self.beit3.gradient_checkpointing = enabled
        self.swin.set_gradient_checkpointing(enabled)

    def _perceive(self, image: Tensor) -> tuple[Tensor, ...]:
        """A padded image -> mask features at stride 4, maps at strides 8, 16 and 32."""
        mask_features, scales = self.pixel_decoder(self.swin(image))
        return (mask_features, *scales[::-1])


def _padded(image: Tensor) -> Tensor:
    """Image [B, 3, H, W] with zeros at its right and bottom up to multiples of STRIDE."""
    height, width = image.shape[-2:]
    return F.pad(image, (0, -width % STRIDE, 0, -height % STRIDE))


def _build(
    encoder: BEiT3Encoder,
    swin: Swin,
    vision_weights: str | None,
    text_weights: str | None,
    *,
    pixel_decoder: Mapping[str, int] = {},
    predictor: Mapping[str, Any],
    **model: Any,
) -> DeRIS:
    if text_weights is not None:
        load_beit3(encoder, text_weights)
    pixels = BiasedPixelDecoder(tuple(swin.channels), **pixel_decoder)
    built = DeRIS(encoder, swin, pixels, LoopbackDecoder(**predictor), **model)
    if vision_weights is not None and is_file(vision_weights):
        load_swin(swin, vision_weights)
    elif vision_weights is not None:
        load_mask2former(built, vision_weights)
    return built


def _info(size: int, tokenizer: str, max_tokens: int, points: int = 12544, *, view: int = 224) -> ModelInfo:
    return ModelInfo(
        paper="DeRIS: Decoupling Perception and Cognition through Loopback Synergy (ICCV 2025)",
        official_code="github.com/Dmmm1997/DeRIS, commit 2406687",
        licence="MIT",
        aml_scores="the image alone x the words alone through BEiT-3",
        preprocess=Preprocess(
            size=size,
            resize="square_aliased",
            view_size=view,
            view="bilinear",
            normalization="imagenet",
            tokenizer=tokenizer,
            max_tokens=max_tokens,
            sentence_field="sent",
        ),
        protocol=NETWORK_FRAME,
        loss="deris",
        loss_kwargs={"points": points},
    )


@register_model(_info(384, "YxZhang/evf-sam", 50))
def deris_b(
    *,
    vision_weights: str | None = None,
    text_weights: str | None = None,
    vocab_size: int = 64010,
    queries: int = 20,
    score_threshold: float = 0.7,
    mixing: Mixing = "batch",
    dropout: float = 0.1,
    drop_path_rate: float = 0.1,
    swin_drop_path_rate: float = 0.3,
) -> DeRIS:
    """DeRIS-B: BEiT-3 base at 224 pixels, Swin-S at 384.

    vision_weights: transformers' Mask2Former, a Hub id or a folder, for the whole perception branch; or a Swin file.
    text_weights: BEiT-3's file (beit3_base_patch16_224.pth), of which
    image and words are used. queries: 20 for gRefCOCO, 10 for RefCOCO. mixing: see `layers/loopback_decoder.py`.
    dropout: of the aligner. drop_path_rate: BEiT-3's.
    """
    encoder = BEiT3Encoder(vocab_size=max(vocab_size, 64010), drop_path=drop_path_rate)
    swin = Swin(
        embed_dim=96,
        depths=(2, 2, 18, 2),
        num_heads=(3, 6, 12, 24),
        window_size=7,
        drop_path_rate=swin_drop_path_rate,
    )
    return _build(
        encoder,
        swin,
        vision_weights,
        text_weights,
        predictor={"queries": queries, "mixing": mixing},
        score_threshold=score_threshold,
        aligner_dropout=dropout,
    )


@register_model(_info(384, "YxZhang/evf-sam", 50))
def deris_l(
    *,
    vision_weights: str | None = None,
    text_weights: str | None = None,
    vocab_size: int = 64010,
    queries: int = 20,
    score_threshold: float = 0.9,
    mixing: Mixing = "batch",
    dropout: float = 0.1,
    swin_drop_path_rate: float = 0.3,
) -> DeRIS:
    """DeRIS-L: BEiT-3 large at 224 pixels without drop path, as released, Swin-B with window 12 at 384.

    vision_weights: of Swin-B; text_weights: beit3_large_patch16_224.pth; all as in `deris_b`.
    """
    encoder = BEiT3Encoder(dim=1024, depth=24, heads=16, vocab_size=max(vocab_size, 64010))
    swin = Swin(
        embed_dim=128,
        depths=(2, 2, 18, 2),
        num_heads=(4, 8, 16, 32),
        window_size=12,
        drop_path_rate=swin_drop_path_rate,
    )
    return _build(
        encoder,
        swin,
        vision_weights,
        text_weights,
        predictor={"queries": queries, "mixing": mixing},
        score_threshold=score_threshold,
        aligner_dropout=dropout,
    )


@register_model(_info(96, "wordpiece", 24, points=1024, view=96))
def deris_tiny(
    *,
    vision_weights: str | None = None,
    text_weights: str | None = None,
    vocab_size: int = 512,
    score_threshold: float = 0.5,
    mixing: Mixing = "queries",
    dropout: float = 0.0,
    drop_path_rate: float = 0.0,
) -> DeRIS:
    """A small DeRIS, its Swin trained too, that learns synthetic scenes from scratch on two CPU cores."""
    encoder = BEiT3Encoder(
        dim=96,
        depth=4,
        heads=4,
        patch=8,
        table_size=12,
        vocab_size=vocab_size,
        text_positions=66,
        drop_path=drop_path_rate,
    )
    swin = Swin(
        embed_dim=32,
        depths=(1, 1, 2, 1),
        num_heads=(2, 4, 8, 8),
        window_size=4,
        drop_path_rate=drop_path_rate,
    )
    return _build(
        encoder,
        swin,
        vision_weights,
        text_weights,
        pixel_decoder={"dim": 64, "mask_dim": 64, "layers": 2, "heads": 4, "feedforward": 128},
        predictor={"dim": 64, "queries": 5, "heads": 4, "feedforward": 128, "mixing": mixing},
        aligner_feedforward=128,
        aligner_dropout=dropout,
        score_threshold=score_threshold,
        train_swin=True,
        encoder_lr_scale=1.0,
    )
