"""Recorded tensors of the official CRIS code (commit e596332) and where our model computes them."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from amltrain.models.backbones.clip import CLIPText
from amltrain.models.backbones.resnet import CLIPResNet
from amltrain.models.cris import CRIS
from tests.parity.compare import Adapter, Read
from tests.parity.detris import batch


def build(config: Mapping[str, Any]) -> CRIS:
    """The tiny case's JSON has the official code's configuration under "cfg" and the encoders' sizes under "clip"."""
    cfg, clip = config["cfg"], config["clip"]
    return CRIS(
        vision=CLIPResNet(
            width=clip["vision_width"],
            depths=clip["vision_layers"],
            embed_dim=clip["embed_dim"],
            table_size=clip["image_resolution"] // 32,
        ),
        text=CLIPText(
            width=clip["transformer_width"],
            layers=clip["transformer_layers"],
            heads=clip["transformer_heads"],
            vocab_size=clip["vocab_size"],
            max_positions=clip["context_length"],
            embed_dim=clip["embed_dim"],
        ),
        pyramid_dims=cfg["fpn_out"],
        layers=cfg["num_layers"],
        heads=cfg["num_head"],
        feedforward=cfg["dim_ffn"],
        dropout=0.0,
    )


def whole(inputs: tuple[Any, ...], output: Any) -> Tensor:
    return output


def item(index: int) -> Read:
    return lambda inputs, output: output[index]


CAPTURES: dict[str, tuple[str, Read]] = {
    "inter.vis.c3": ("vision", item(0)),
    "inter.vis.c4": ("vision", item(1)),
    "inter.vis.c5": ("vision", item(2)),
    "inter.vis.layer4_before_attnpool": ("vision.stages.3", whole),
    "inter.text.tokens": ("text", item(0)),
    "inter.text.state": ("text", item(1)),
    **{f"inter.neck.f{i + 3}": (f"neck.levels.{i}", lambda inputs, output: inputs[0]) for i in range(3)},
    "inter.neck.out": ("neck", whole),
    "inter.decoder.layer0": ("decoder.layers.0", lambda inputs, output: output.transpose(0, 1)),
    "inter.decoder.out": ("decoder", lambda inputs, output: output.flatten(2)),
    "inter.proj.vis": ("head.visual", whole),
}

ADAPTER = Adapter(
    build=build,
    loss="binary_cross_entropy",
    captures=CAPTURES,
    batch=batch,
    left_out={"train.target_resized": "our loss resizes the target itself; output.loss depends on it"},
)
