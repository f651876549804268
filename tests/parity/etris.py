"""Recorded tensors of official ETRIS code (commit cdc6d8e), both image towers, and where our model computes them."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from amltrain.models.backbones.clip import CLIPText, CLIPViT
from amltrain.models.backbones.resnet import CLIPResNet
from amltrain.models.etris import ETRIS
from tests.parity.compare import Adapter, Read
from tests.parity.detris import batch, first_gated_map, whole


def build(config: Mapping[str, Any]) -> ETRIS:
    """The tiny cases' JSON has the official code's configuration under "cfg" and the encoders' sizes under "clip"."""
    cfg, clip = config["cfg"], config["clip"]
    vision: CLIPResNet | CLIPViT
    if clip["vision_patch_size"] is None:
        vision = CLIPResNet(
            width=clip["vision_width"],
            depths=clip["vision_layers"],
            embed_dim=clip["embed_dim"],
            table_size=clip["image_resolution"] // 32,
        )
    else:
        vision = CLIPViT(
            width=clip["vision_width"],
            layers=clip["vision_layers"],
            heads=4,  # forced in the recording, as its JSON says
            patch_size=clip["vision_patch_size"],
            table_size=config["input_size"] // clip["vision_patch_size"],
            embed_dim=clip["embed_dim"],
        )
    return ETRIS(
        vision=vision,
        text=CLIPText(
            width=clip["transformer_width"],
            layers=clip["transformer_layers"],
            heads=clip["transformer_heads"],
            vocab_size=clip["vocab_size"],
            max_positions=clip["context_length"],
            embed_dim=clip["embed_dim"],
        ),
        bridge_dim=cfg["ladder_dim"],
        bridge_heads=cfg["nhead"],
        layers=cfg["num_layers"],
        heads=cfg["num_head"],
        feedforward=cfg["dim_ffn"],
        dropout=0.0,
    )


def tokens_first(inputs: tuple[Any, ...], output: Any) -> Tensor:
    """[B, n, d] -> [n, B, d]."""
    return output.transpose(0, 1)


def given_map(index: int) -> Read:
    return lambda inputs, output: inputs[0][index]


CAPTURES: dict[str, tuple[str, Read]] = {
    "inter.bridger.fusion_v0": ("bridges.0.image_reads", tokens_first),
    "inter.bridger.fusion_t0": ("bridges.0.text_reads", tokens_first),
    "inter.bridger.zoom_out1": ("bridges.1.expand_image", whole),
    "inter.bridger.linear2_2": ("bridges.2.expand_text", tokens_first),
    **{f"inter.vis.v{i + 3}": ("neck", given_map(i)) for i in range(3)},
    "inter.text.tokens": ("text.ln_final", whole),
    "inter.text.state": ("head.kernel", lambda inputs, output: inputs[0]),
    "inter.neck.fusion3": ("neck.aggregate", first_gated_map),
    "inter.neck.out": ("neck", whole),
    "inter.decoder.layer0": ("decoder.layers.0", tokens_first),
    "inter.decoder.out": ("decoder", lambda inputs, output: output.flatten(2)),
    "inter.proj.vis": ("head.visual", whole),
}

ADAPTER = Adapter(
    build=build,
    loss="binary_cross_entropy",
    captures=CAPTURES,
    batch=batch,
    left_out={
        "train.target_resized": "our loss resizes the target itself; output.loss depends on it",
        "extra.clip_pos_embed": "the position table's resampling; tests/models/test_etris.py compares it",
    },
)
"""1e-5 for logits as the card says; activations at three times the official distance from float64 or 3e-5."""
