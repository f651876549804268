"""Recorded tensors of the official DETRIS code (commit c94b1e1) and where our model computes them."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from amltrain.models.backbones.clip import CLIPText
from amltrain.models.backbones.dinov2 import DINOv2
from amltrain.models.detris import DETRIS
from amltrain.records import Batch
from tests.parity.compare import Adapter, Read, default_batch


def build(config: Mapping[str, Any]) -> DETRIS:
    """The tiny case's JSON has the official code's own configuration under "cfg" and the encoders' sizes beside it."""
    cfg, vision, text = config["cfg"], config["dinov2"], config["clip_text"]
    return DETRIS(
        vision=DINOv2(
            embed_dim=vision["embed_dim"],
            depth=vision["depth"],
            num_heads=vision["num_heads"],
            table_size=vision["pos_embed_grid"][0],
        ),
        text=CLIPText(
            width=text["transformer_width"],
            layers=text["transformer_layers"],
            heads=text["transformer_heads"],
            vocab_size=text["vocab_size"],
            max_positions=text["context_length"],
            embed_dim=text["embed_dim"],
        ),
        vision_adapters=cfg["visual_adapter_layer"],
        vision_adapter_dim=cfg["visual_adapter_dim"],
        text_adapters=cfg["txtual_adapter_layer"],
        text_adapter_dim=cfg["txt_adapter_dim"],
        taps=tuple(cfg["output_dinov2"]),
        layers=cfg["num_layers"],
        heads=cfg["num_head"],
        feedforward=cfg["dim_ffn"],
        dropout=0.0,
    )


def batch(recorded: Mapping[str, Tensor]) -> Batch:
    """The recorded soft target has steps finer than 1/255; only the test hands it over as a float."""
    return default_batch(recorded)._replace(target=recorded["input.target"][:, 0] * 255)


def whole(inputs: tuple[Any, ...], output: Any) -> Tensor:
    return output


def item(index: int) -> Read:
    return lambda inputs, output: output[index]


def tokens_first(inputs: tuple[Any, ...], output: Any) -> Tensor:
    """[B, C, h, w] -> [h w, B, C]."""
    return output.flatten(2).permute(2, 0, 1)


def first_gated_map(inputs: tuple[Any, ...], output: Any) -> Tensor:
    return tokens_first((), inputs[0].chunk(3, dim=1)[0])


def given_map(index: int) -> Read:
    return lambda inputs, output: inputs[0][index]


CAPTURES: dict[str, tuple[str, Read]] = {
    "inter.text.block1_adapter": ("text_adapters.1.up", whole),
    "inter.text.tokens": ("text", item(0)),
    "inter.text.state": ("text", item(1)),
    "inter.dino.embed": ("vision.blocks.0.norm1", lambda inputs, output: inputs[0]),
    "inter.dino.block0": ("vision.blocks.1.norm1", lambda inputs, output: inputs[0]),
    "inter.dino.block1_adapter_cross": ("aligners.1.cross", whole),
    "inter.dino.block1_adapter": ("aligners.1.up", whole),
    "inter.dino.block1": ("vision.blocks.2.norm1", lambda inputs, output: inputs[0]),
    "inter.text.block1": ("text.blocks.2.norm1", lambda inputs, output: inputs[0].transpose(0, 1)),
    **{f"inter.vis.v{i + 3}": ("neck", given_map(i)) for i in range(3)},
    "inter.neck.fusion3": ("neck.aggregate", first_gated_map),
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
