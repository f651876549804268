"""Recorded tensors of MagNet's official code (commit 2debc7e) and where our model computes them.

The official code has no loss: the recorded one is binary cross-entropy at the input's size, to check the backward pass.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from amltrain.losses import upsample_logits
from amltrain.models.backbones.swin import Swin
from amltrain.models.backbones.text import build_bert
from amltrain.models.magnet import MagNet
from amltrain.records import Batch, ModelOutput
from tests.parity.compare import Adapter, Read


def build(config: Mapping[str, Any]) -> MagNet:
    swin = Swin(
        embed_dim=config["embed_dim"],
        depths=config["depths"],
        num_heads=config["num_heads"],
        window_size=config["window_size"],
        drop_path_rate=0.0,
        output_norms=False,
    )
    text = build_bert(
        vocab_size=config["vocab"],
        hidden_size=config["text_dim"],
        layers=config["text_layers"],
        heads=config["text_heads"],
        intermediate_size=config["text_ffn"],
        max_positions=config["text_maxpos"],
        dropout=0.0,
    )
    return MagNet(
        swin=swin,
        text_encoder=text,
        dim=config["conv_dim"],
        heads=config["dec_heads"],
        encoder_layers=config["enc_layers"],
        encoder_feedforward=config["enc_ffn"],
        decoder_layers=config["dec_layers_plus1"] - 1,
        decoder_feedforward=config["dec_ffn"],
    )


def whole(inputs: tuple[Any, ...], output: Any) -> Tensor:
    return output


def item(index: int) -> Read:
    return lambda inputs, output: output[index]


def mixed(inputs: tuple[Any, ...], output: Any) -> Tensor:
    return output[0].permute(0, 3, 1, 2)


def scale(index: int) -> Read:
    return lambda inputs, output: output[1][index]


def first_input(inputs: tuple[Any, ...], output: Any) -> Tensor:
    return inputs[0]


def resized(output: ModelOutput, batch: Batch) -> Tensor:
    return upsample_logits(output.logits, batch.image.shape[-2:])


CAPTURES: dict[str, tuple[str, Read]] = {
    **{f"inter.i{i}": (f"swin.layers.{i}", whole) for i in range(4)},
    **{f"inter.l{i}": (f"text_encoder.encoder.layer.{2 * i + 1}", whole) for i in range(4)},
    **{f"inter.pwam{i}": (f"image_fusion.{i}.whole", whole) for i in range(4)},
    **{f"inter.feat{i}": (f"image_fusion.{i}", mixed) for i in range(4)},
    **{f"inter.lres{i}": (f"text_fusion.{i}", whole) for i in range(3)},
    "inter.mask_features": ("pixel_decoder", item(0)),
    **{f"inter.ms{i}": ("pixel_decoder", scale(i)) for i in range(3)},
}

ADAPTER = Adapter(
    build=build,
    loss="cross_entropy_dice",
    loss_kwargs={"dice_weight": 0.0},
    captures=CAPTURES,
    outputs={
        "output.logits_up": resized,
        "output.prob": lambda output, batch: resized(output, batch).sigmoid(),
    },
    left_out={
        "unpadded.": "tests/models/test_magnet.py compares it",
        "output.class_logits": "without effect on the mask: our model has no class head",
        "inter.lres3": "without effect on the mask: our model has no fusion of the words after the last stage",
        "inter.lang_att0": "computed inside inter.lres0, which is compared",
        "inter.mask_step0": "the mask of the initial query, inside the decoder; output.logits depends on it",
    },
)
"""Gradients: the official code's own distance from float64 reaches 1.5e-4 of a tensor's largest value."""
