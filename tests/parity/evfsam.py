"""Recorded tensors of the official EVF-SAM and EVF-SAM2 code (commit 9935dc5) and where our model computes them.

The official logits are the small ones, before any resize; the official loss is taken at every picture's original size.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import SamMaskDecoderConfig, SamVisionConfig

from amltrain.losses import dice_loss
from amltrain.models.beit3 import BEiT3Encoder
from amltrain.models.evfsam import EVFSAM, sam2
from amltrain.models.layers.prompted_sam import PromptedSAM
from amltrain.records import Batch, ModelOutput
from tests.parity.compare import Adapter, Read, ReadOutput, default_batch

CASE: dict[str, Tensor] = {}
"""What a batch cannot say: BEiT-3's pictures, sizes and targets of the current case."""


def build(config: Mapping[str, Any]) -> EVFSAM:
    beit3 = config["beit3"]
    encoder = BEiT3Encoder(
        dim=beit3["dim"],
        depth=beit3["layers"],
        heads=beit3["heads"],
        patch=beit3["patch_size"],
        table_size=beit3["img_size"] // beit3["patch_size"],
        vocab_size=beit3["vocab_size"],
        text_positions=beit3["text_positions"],
    )
    model = EVFSAM(encoder, build_sam2(config["sam2"]) if "sam2" in config else build_sam(config["sam"]))
    if "sam2" in config:
        model.sam.requires_grad_(False)
    model.small_picture = lambda batch: CASE["image_beit3"].to(batch.image.dtype)
    return model


def build_sam(sam: Mapping[str, Any]) -> PromptedSAM:
    vision = SamVisionConfig(
        hidden_size=sam["dim"],
        output_channels=sam["out"],
        num_hidden_layers=sam["depth"],
        num_attention_heads=sam["heads"],
        image_size=sam["img_size"],
        patch_size=sam["patch_size"],
        window_size=sam["window"],
        global_attn_indexes=sam["global"],
    )
    decoder = SamMaskDecoderConfig(
        hidden_size=sam["out"],
        mlp_dim=sam["dec_mlp"],
        num_attention_heads=sam["dec_heads"],
        iou_head_hidden_dim=sam["iou_hidden"],
        layer_norm_eps=1e-5,
    )
    return PromptedSAM(vision, decoder)


def build_sam2(sizes: Mapping[str, Any]) -> PromptedSAM:
    return sam2(
        hidden=sizes["hidden"],
        heads=sizes["heads"],
        blocks=sizes["stages"],
        windows=sizes["window_spec"],
        whole=sizes["global"],
        size=sizes["img_size"],
        background=sizes["bkg"][0],
        width=sizes["d"],
        decoder_heads=sizes["dec_heads"],
        decoder_mlp=sizes["dec_mlp"],
        iou_hidden=sizes["iou_hidden"],
    )


def batch(recorded: Mapping[str, Tensor]) -> Batch:
    CASE.clear()
    CASE.update({name.removeprefix("input."): value for name, value in recorded.items() if name.startswith("input.")})
    return default_batch(recorded)


def original_logits(output: ModelOutput, sample: int) -> Tensor:
    """As the official code: to SAM's side, the padding cut off, to the picture's size; SAM 2: in one step. [h0, w0]."""
    logits = output.aux["low_resolution"][sample : sample + 1]
    size = tuple(CASE["original_hw"][sample].tolist())
    if "resized_hw" in CASE:
        side = CASE["image"].shape[-1]
        height, width = CASE["resized_hw"][sample].tolist()
        logits = F.interpolate(logits, (side, side), mode="bilinear", align_corners=False)[..., :height, :width]
    return F.interpolate(logits, size, mode="bilinear", align_corners=False)[0, 0]


def criterion() -> Callable[[ModelOutput, Batch], dict[str, Tensor]]:
    """Mean over sentences of binary cross-entropy and Dice at the original size."""

    def loss(output: ModelOutput, batch: Batch) -> dict[str, Tensor]:
        bce, dice = [], []
        for sample in range(len(batch.image)):
            logits = original_logits(output, sample)[None, None]
            target = CASE[f"target_original.{sample}"][None, None].to(logits.dtype)
            bce.append(F.binary_cross_entropy_with_logits(logits, target))
            dice.append(dice_loss(logits, target, smoothing=1e-3))
        terms = {"bce": torch.stack(bce).mean(), "dice": torch.stack(dice).mean()}
        return {"loss": terms["bce"] + terms["dice"], **terms}

    return loss


def whole(inputs: tuple[Any, ...], output: Any) -> Tensor:
    return output


def given(inputs: tuple[Any, ...], output: Any) -> Tensor:
    return inputs[0]


def item(index: int) -> Read:
    return lambda inputs, output: output[index]


def one(index: int) -> Read:
    """Of a pair of [B, 1, ...] tensors."""
    return lambda inputs, output: output[index][:, 0]


def term(name: str) -> ReadOutput:
    return lambda output, batch: criterion()(output, batch)[name]


def at_original(sample: int) -> ReadOutput:
    return lambda output, batch: original_logits(output, sample)


DECODER, VISION = "sam.mask_decoder", "sam.vision_encoder"
CAPTURES: dict[str, tuple[str, Read]] = {
    "inter.beit3.block_input": ("beit3.encoder.layers.0", given),
    "inter.beit3.block0_attn": ("beit3.encoder.layers.0.self_attn", whole),
    **{f"inter.beit3.block{i}": (f"beit3.encoder.layers.{i}", whole) for i in range(3)},
    "inter.beit3.encoder_out": ("beit3.encoder.layer_norm", whole),
    "inter.prompt": ("projector", whole),
    "inter.sam.patch_embed": (f"{VISION}.patch_embed", whole),
    **{f"inter.sam.block{i}": (f"{VISION}.layers.{i}", whole) for i in range(4)},
    "inter.sam.block0_attn_windows": (f"{VISION}.layers.0.attn", item(0)),
    "inter.sam.image_embedding": (f"{VISION}.neck", whole),
    **{f"inter.sam2.block{i}": (f"{VISION}.backbone.blocks.{i}", whole) for i in (0, 1, 3, 7)},
    "inter.high_res_s4": (f"{DECODER}.conv_s0", whole),
    "inter.high_res_s8": (f"{DECODER}.conv_s1", whole),
    "inter.dec.layer0_self_attn": (f"{DECODER}.transformer.layers.0.self_attn", item(0)),
    **{f"inter.dec.layer{i}_tokens": (f"{DECODER}.transformer.layers.{i}", one(0)) for i in range(2)},
    **{f"inter.dec.layer{i}_image": (f"{DECODER}.transformer.layers.{i}", one(1)) for i in range(2)},
    "inter.dec.tokens_out": (f"{DECODER}.transformer", one(0)),
    "inter.dec.upscale_conv1": (f"{DECODER}.upscale_conv1", whole),
    "inter.dec.upscale_norm": (f"{DECODER}.upscale_layer_norm", whole),
    "inter.dec.upscaled": (f"{DECODER}.upscale_conv2", lambda inputs, output: F.gelu(output)),
    **{f"inter.dec.hyper{i}": (f"{DECODER}.output_hypernetworks_mlps.{i}", whole) for i in range(4)},
    "inter.dec.iou_all": (f"{DECODER}.iou_prediction_head", whole),
    "inter.iou_all": (f"{DECODER}.iou_prediction_head", whole),
    "inter.object_score": (f"{DECODER}.pred_obj_score_head", whole),
    "output.iou": (DECODER, lambda inputs, output: output[1].amax(dim=-1)),
    "output.chosen_token": (DECODER, lambda inputs, output: 1 + output[1].argmax(dim=-1)),
}
WITHOUT_MODULE = "computed inside a function; "

ADAPTER = Adapter(
    build=build,
    loss=criterion,
    captures=CAPTURES,
    last=["inter.beit3.encoder_out"],
    batch=batch,
    outputs={
        "output.logits": lambda output, batch: output.aux["low_resolution"],
        "output.logits_resized": lambda output, batch: output.logits,
        "output.pred": lambda output, batch: (output.logits > 0).to(torch.uint8),
        **{f"output.mask_logits_original.{sample}": at_original(sample) for sample in range(3)},
    },
    training_outputs={"output.bce": term("bce"), "output.dice": term("dice")},
    exact=("output.chosen_token",),
    left_out={
        "inter.beit3.vision_embed": WITHOUT_MODULE + "inter.beit3.block_input depends on it",
        "inter.dec.image_pe": WITHOUT_MODULE + "inter.dec.layer0_image depends on it",
        "inter.dec.tokens_in": WITHOUT_MODULE + "inter.dec.tokens_out depends on it",
        "inter.dec.image_in": WITHOUT_MODULE + "inter.dec.tokens_out depends on it",
        "inter.dense": WITHOUT_MODULE + "inter.dec.layer0_image depends on it",
        "inter.sparse": WITHOUT_MODULE + "it is inter.prompt",
        "inter.masks_all": "the masks of the other tokens are not returned; output.logits is one of them",
    },
)
