"""SAM 3 as a referring segmentation model: transformers' `Sam3Model` with one mask per sentence.

Paper: Carion et al., SAM 3: Segment Anything with Concepts, 2025. Official code: facebook/sam3 (weights under Meta's
SAM License, on request), as published in transformers; its modules are used as they are. SAM 3 was trained on short
noun phrases of at most 32 tokens, not on referring expressions: it is a starting point to fine-tune.

The mask is the semantic output (one logit per pixel), the presence token is the no-target head.
Boxes, instance masks and their scores are left out of the loss (they are those of `sam3_instances`), so the modules
that only they read stay frozen, with the geometry encoder, which reads boxes, and none are given here.
The input size is fixed when the model is built (1008 pixels in the official code): images of another size are resized
to it, bilinearly, and logits are those of the resized image. The layers are called one by one, because
`Sam3Model.forward` waits for the device in every step (it makes tensors of sizes and reads masks); the numbers are the
same.

What AML scores: the image pyramid's stride-14 map and the projected tokens, both 256 wide, before any fusion. Equal
widths let `projection: identity` run, but the two were not trained to be compared by cosine.

Dimensions: B batch, L text tokens, C width (256), h w the stride-14 grid, N = h w, Q object queries.
"""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from amltrain.config.schema import Preprocess
from amltrain.errors import UserError
from amltrain.models.backbones.weights import fill, from_pretrained, is_file, read_state_dict
from amltrain.models.base import Conversion, RISModel, convert
from amltrain.models.layers.basic import Tuning, tune
from amltrain.models.registry import NETWORK_FRAME, ModelInfo, register_model
from amltrain.records import Batch, Features, ModelOutput

RENAMES = [(r"^(detector_model\.)?", "sam3.")]
DROPS = [(r"tracker_(model|neck)\..*", "the video tracker, which images do not need")]
UNUSED = (
    "geometry_encoder",
    "dot_product_scoring",
    "text_encoder.text_projection",
    "detr_decoder.box_head",
    "detr_decoder.output_layer_norm",
    "mask_decoder.mask_embedder",
    "mask_decoder.instance_projection",
)
"""Modules that the mask and the presence token never read. The box head moves the queries' boxes, but through a cut
gradient, so it keeps its pretrained weights."""
FINEST, MIDDLE, COARSE = 0, 1, 2


class SAM3(RISModel):
    """SAM 3 with one-channel logits at a quarter of a patch (stride 3.5 in the official code) and a no-target head."""

    encoders = ("sam3.vision_encoder.backbone", "sam3.text_encoder")
    unused: tuple[str, ...] = UNUSED
    mask_channels = 1
    encodes_image_alone = True

    def __init__(
        self,
        sam3: Any,
        *,
        vision_tuning: Tuning = "frozen",
        text_tuning: Tuning = "frozen",
        lora_rank: int = 16,
        encoder_lr_scale: float = 0.1,
    ) -> None:
        """sam3: a transformers Sam3Model with its weights.

        vision_tuning, text_tuning: of the image and the text transformer; pyramid and heads always train.
        """
        super().__init__()
        self.sam3 = sam3
        config = sam3.config
        self.image_size = int(config.image_size)
        width = int(config.detr_encoder_config.hidden_size)
        self.alignment_dims = self.fused_dims = (width, width)
        self.encoder_lr_scale = encoder_lr_scale
        for name in self.unused:
            self.sam3.get_submodule(name).requires_grad_(False)
        self.sam3.vision_encoder.neck.fpn_layers[-1].requires_grad_(False)  # a map that nothing reads
        pixels = self.sam3.mask_decoder.pixel_decoder
        pixels.conv_layers[2:].requires_grad_(False)  # three maps need two steps; the official code has three
        pixels.norms[2:].requires_grad_(False)
        self.tunings: dict[str, Tuning] = {"vision_encoder.backbone": vision_tuning, "text_encoder": text_tuning}
        for name, tuning in self.tunings.items():
            tune(self.sam3.get_submodule(name), tuning, lora_rank)

    def train(self, mode: bool = True) -> "SAM3":
        super().train(mode)
        for name, tuning in self.tunings.items():
            if tuning == "frozen":
                self.sam3.get_submodule(name).train(False)
        return self

    def encode(self, batch: Batch) -> Features:
        return self.encode_with_image(batch, self.encode_image(batch.image))

    def encode_with_image(self, batch: Batch, image: tuple[Tensor, ...]) -> Features:
        length = batch.input_ids.shape[1]
        causal = batch.text_mask[:, None, None, :].expand(-1, 1, length, length).tril()
        words = self.sam3.text_encoder.text_model(input_ids=batch.input_ids, attention_mask=causal)
        text = self.sam3.text_projection(words.last_hidden_state)
        return Features(image, text, batch.text_mask)

    def encode_image(self, image: Tensor) -> tuple[Tensor, ...]:
        """Image [B, 3, H, W] -> the pyramid's maps [B, C, h_i, w_i] at 4x, 2x and 1x the grid of patches."""
        size = (self.image_size, self.image_size)
        if image.shape[-2:] != size:
            image = F.interpolate(image, size, mode="bilinear", align_corners=False)
        encoder = self.sam3.vision_encoder
        tokens = encoder.backbone(image).last_hidden_state
        side = self.image_size // encoder.backbone.config.patch_size
        grid = tokens.transpose(1, 2).unflatten(2, (side, side))
        return tuple(layer(grid) for layer in encoder.neck.fpn_layers[:-1])

    def decode(self, features: Features, batch: Batch) -> ModelOutput:
        vision, code, mask, shape = self._fused(features)
        queries, _ = self._queries(vision, code, features.text, mask, shape)
        presence = self._presence(queries[-1])
        logits, fused, _ = self._mask(vision, features, mask)
        no_target = torch.cat([presence, torch.zeros_like(presence)], dim=1)
        return ModelOutput(logits, {"no_target": no_target, "fused_visual": fused, "fused_text": features.text})

    def _fused(self, features: Features) -> tuple[Tensor, Tensor, Tensor, tuple[int, int]]:
        """The coarse map after it has read the words, and its position code, [B, N, C]; the words' mask
        [B, 1, 1, L] bool; and the map's size (h, w).
        """
        coarse = features.visual[COARSE]
        shape = (coarse.shape[-2], coarse.shape[-1])
        code = self.sam3.vision_encoder.neck.position_encoding(coarse.shape, coarse.device, coarse.dtype)
        code = code.flatten(2).transpose(1, 2)
        mask = features.text_mask[:, None, None, :]
        vision = coarse.flatten(2).transpose(1, 2)
        for layer in self.sam3.detr_encoder.layers:
            vision = layer(vision, prompt_feats=features.text, vision_pos_encoding=code, prompt_cross_attn_mask=mask)
        return vision, code, mask, shape

    def _queries(
        self, vision: Tensor, code: Tensor, text: Tensor, mask: Tensor, shape: tuple[int, int]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """After each layer: the presence token and the queries [B, 1 + Q, C], and the queries' boxes [B, Q, 4] shares.

        vision and its position code [B, N, C]. A layer's boxes have a gradient, those that it starts from have none.
        """
        decoder = self.sam3.detr_decoder
        batch = vision.shape[0]
        boxes = decoder.reference_points.weight.sigmoid().expand(batch, -1, -1)
        start = torch.cat([decoder.presence_token.weight, decoder.query_embed.weight])
        queries = start.expand(batch, -1, -1)
        every: list[Tensor] = []
        found: list[Tensor] = []
        for layer in decoder.layers:
            places = decoder.ref_point_head(decoder.position_encoding.encode_boxes(boxes))
            nearness = decoder._get_rpb_matrix(boxes, shape)  # [B, heads, Q, N]
            queries = layer(
                queries,
                query_pos=places,
                text_features=text,
                vision_features=vision,
                vision_pos_encoding=code,
                text_cross_attn_mask=mask,
                vision_cross_attn_mask=F.pad(nearness, (0, 0, 1, 0)),
            )
            step = decoder.box_head(decoder.output_layer_norm(queries[:, 1:]))
            found.append((step + _inverse_sigmoid(boxes)).sigmoid())
            boxes = found[-1].detach()
            every.append(queries)
        return every, found

    def _presence(self, queries: Tensor) -> Tensor:
        """Logit that the sentence means something in the image, [B, 1], of the last layer's queries."""
        decoder = self.sam3.detr_decoder
        logit = decoder.presence_head(decoder.presence_layer_norm(queries[:, :1])).squeeze(-1)
        return logit.clamp(-decoder.clamp_presence_logit_max_val, decoder.clamp_presence_logit_max_val)

    def _mask(self, vision: Tensor, features: Features, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Semantic logits [B, 1, 4h, 4w], the fused map [B, C, h, w], and the pixels [B, C, 4h, 4w] made of it."""
        head = self.sam3.mask_decoder
        read, _ = head.prompt_cross_attn(
            query=head.prompt_cross_attn_norm(vision),
            key=features.text,
            value=features.text,
            attention_mask=mask,
        )
        vision = vision + head.prompt_cross_attn_dropout(read)
        fused = vision.transpose(1, 2).unflatten(2, features.visual[COARSE].shape[-2:])
        pixels = head.pixel_decoder([features.visual[FINEST], features.visual[MIDDLE], fused])
        return head.semantic_projection(pixels), fused, pixels

    def reencode_image(self, batch: Batch, features: Features) -> Features:
        return features._replace(visual=self.encode_image(batch.image))

    def param_groups(self, lr: float, weight_decay: float) -> list[dict[str, Any]]:
        """The transformers of image and text at their own rate when trained whole; vectors and embeddings no decay."""
        groups: dict[str, dict[str, Any]] = {}
        for name, parameter in self.sam3.named_parameters():
            if not parameter.requires_grad:
                continue
            encoder = next((part for part in self.tunings if name.startswith(part)), None)
            kind = "rest" if encoder is None else encoder.split("_")[0]
            scale = self.encoder_lr_scale if encoder is not None and self.tunings[encoder] == "full" else 1.0
            decays = parameter.ndim > 1 and not any(word in name for word in ("embed", "token", "reference_points"))
            group = groups.setdefault(
                f"{kind}_{'decay' if decays else 'no_decay'}",
                {"params": [], "lr": lr * scale, "weight_decay": weight_decay if decays else 0.0},
            )
            group["params"].append(parameter)
        return [{"name": name, **group} for name, group in groups.items()]

    def convert_state_dict(self, official: Mapping[str, Tensor]) -> Conversion:
        """Convert transformers' published file (facebook/sam3), with or without the video tracker."""
        return convert(official, self.state_dict(), renames=RENAMES, drops=DROPS)

    def set_gradient_checkpointing(self, enabled: bool) -> None:
        """Recompute the layers of the image and the text transformer; the small heads are kept."""
        for name in self.tunings:
            part: Any = self.sam3.get_submodule(name)
            part._set_gradient_checkpointing(enabled, partial(checkpoint, use_reentrant=False))


def _inverse_sigmoid(x: Tensor, eps: float = 1e-3) -> Tensor:
    """log(x / (1 - x)), both bounded below by eps as in SAM 3."""
    x = x.clamp(0, 1)
    return (x.clamp(min=eps) / (1 - x).clamp(min=eps)).log()


def _build_sam3(**fields: Any) -> Any:
    try:
        from transformers import Sam3Config, Sam3Model
    except ImportError as error:
        raise UserError("sam3 needs transformers 5 or newer; pip install -U 'transformers>=5'") from error
    return Sam3Model(Sam3Config(**fields))


def _load(sam3: Any, weights: str) -> None:
    """Fill a Sam3Model from a Hub id, a folder or a file of transformers' SAM 3."""
    if is_file(weights):
        state = {k.removeprefix("detector_model."): v for k, v in read_state_dict(Path(weights)).items()}
        state = {key: value for key, value in state.items() if not key.startswith("tracker_")}
    else:
        called = "SAM 3 (the Hub asks for an account with access)", "model.vision_weights"
        found, report = from_pretrained(type(sam3), weights, called, output_loading_info=True)
        state = {key: value for key, value in found.state_dict().items() if key not in set(report["missing_keys"])}
    fill(sam3, state, weights)


def sam3_info(
    size: int, tokenizer: str, max_tokens: int, loss: str = "mask_and_presence", **kwargs: float
) -> ModelInfo:
    """Facts of the models of this family. kwargs: of the loss."""
    return ModelInfo(
        paper="SAM 3: Segment Anything with Concepts (2025)",
        official_code="huggingface.co/facebook/sam3 through transformers' Sam3Model",
        licence="code Apache-2.0 (transformers); weights SAM License (Meta), access on request",
        aml_scores="stride-14 pyramid map x projected tokens, of equal width, before fusion",
        preprocess=Preprocess(
            size=size,
            resize="square",
            normalization="half",
            tokenizer=tokenizer,
            max_tokens=max_tokens,
            sentence_field="sent",
        ),
        protocol=NETWORK_FRAME,
        loss=loss,
        loss_kwargs=kwargs,
    )


@register_model(sam3_info(1008, "openai/clip-vit-base-patch32", 32))
def sam3(
    *,
    vision_weights: str | None = None,
    text_weights: str | None = None,
    vocab_size: int = 49408,
    image_size: int = 1008,
    vision_tuning: Tuning = "frozen",
    text_tuning: Tuning = "frozen",
    lora_rank: int = 16,
) -> SAM3:
    """SAM 3 at its published size; pyramid, fusion and heads train, the two transformers as you choose.

    vision_weights: the whole model: facebook/sam3, a folder or a file. text_weights: there are none of their own.
    image_size: fixed input side in pixels, a multiple of 14; the pretrained weights are for 1008.
    """
    model = build_published(image_size, vision_weights, text_weights)
    return SAM3(model, vision_tuning=vision_tuning, text_tuning=text_tuning, lora_rank=lora_rank)


def build_published(image_size: int, vision_weights: str | None, text_weights: str | None) -> Any:
    """A Sam3Model of the published size. Raises UserError."""
    _reject_text(text_weights)
    model = _build_sam3(
        vision_config={"backbone_config": {"model_type": "sam3_vit_model", "image_size": image_size}},
    )
    if vision_weights is not None:
        _load(model, vision_weights)
    return model


def _reject_text(weights: str | None) -> None:
    if weights is not None:
        raise UserError("SAM 3's text encoder comes with model.vision_weights; leave model.text_weights out")


@register_model(sam3_info(96, "wordpiece", 24))
def sam3_tiny(
    *,
    vision_weights: str | None = None,
    text_weights: str | None = None,
    vocab_size: int = 512,
    dropout: float = 0.0,
) -> SAM3:
    """A small SAM 3 with the same modules, fully trained, that learns synthetic scenes from scratch; 96 pixels."""
    model = build_small(vocab_size, dropout, vision_weights, text_weights)
    return SAM3(model, vision_tuning="full", text_tuning="full", encoder_lr_scale=1.0)


def build_small(vocab_size: int, dropout: float, vision_weights: str | None, text_weights: str | None) -> Any:
    """A small Sam3Model with patches of 8 pixels. Raises UserError."""
    _reject_text(text_weights)
    start = {"initializer_range": 0.1}  # the official 0.02 is for wide layers; narrow ones would hardly start to learn
    detr = {
        "hidden_size": 64,
        "num_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 128,
        "dropout": dropout,
        **start,
    }
    model = _build_sam3(
        vision_config={
            "backbone_config": {
                "model_type": "sam3_vit_model",
                "image_size": 96,
                "pretrain_image_size": 96,
                "patch_size": 8,
                "hidden_size": 96,
                "intermediate_size": 256,
                "num_hidden_layers": 4,
                "num_attention_heads": 4,
                "window_size": 6,
                "global_attn_indexes": [1, 3],
                "hidden_dropout": dropout,
                **start,
            },
            "fpn_hidden_size": 64,
            **start,
        },
        text_config={
            "model_type": "clip_text_model",
            "vocab_size": vocab_size,
            "hidden_size": 96,
            "intermediate_size": 256,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 64,
            "projection_dim": 64,
            "bos_token_id": 2,
            "eos_token_id": 3,
            "attention_dropout": dropout,
        },
        geometry_encoder_config={**detr, "num_layers": 1},
        detr_encoder_config=detr,
        detr_decoder_config={**detr, "num_queries": 8},
        mask_decoder_config={"hidden_size": 64, "num_attention_heads": 4, **start},
        **start,
    )
    if vision_weights is not None:
        _load(model, vision_weights)
    return model
