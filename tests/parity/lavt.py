"""Recorded tensors of the official LAVT code (commit 1da0af9) and where our model computes them."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from amltrain.losses import upsample_logits
from amltrain.models.backbones.swin import LanguageSwin, Swin
from amltrain.models.backbones.text import build_bert
from amltrain.models.lavt import LAVT
from amltrain.models.layers.pwam import instance_norm
from amltrain.records import Batch, ModelOutput
from tests.parity.compare import Adapter, Read


def build(config: Mapping[str, Any]) -> LAVT:
    swin = Swin(
        embed_dim=config["embed_dim"],
        depths=config["depths"],
        num_heads=config["num_heads"],
        window_size=config["window_size"],
        drop_path_rate=0.0,
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
    backbone = LanguageSwin(swin, text_dim=config["text_dim"], heads=config["mha"])
    return LAVT(backbone=backbone, text_encoder=text, trained_text_layers=None)


def whole(inputs: tuple[Any, ...], output: Any) -> Tensor:
    return output


def map_of(stage: int) -> Read:
    return lambda inputs, output: output[stage]


def resized(output: ModelOutput, batch: Batch) -> Tensor:
    return upsample_logits(output.logits, batch.image.shape[-2:])


CAPTURES: dict[str, tuple[str, Read]] = {
    "inter.text_hidden": ("text_encoder.encoder", lambda inputs, output: output.last_hidden_state),
    "inter.patch_embed": ("backbone.swin.patch_embed", lambda inputs, output: output.permute(0, 3, 1, 2)),
    "inter.stage0_blocks": ("backbone.swin.layers.0", whole),
    "inter.stage0_attn_lang": ("backbone.fusion.0.output", lambda inputs, output: instance_norm(output)),
    "inter.stage0_fused": ("backbone.fusion.0", whole),
    "inter.stage0_down": ("backbone.swin.layers.0.downsample", whole),
    "inter.stage2_blocks": ("backbone.swin.layers.2", whole),
    **{f"inter.feat{i}": ("backbone", map_of(i)) for i in range(4)},
    "inter.dec_y4": ("decoder.levels.0", whole),
    "inter.dec_y3": ("decoder.levels.1", whole),
    "inter.dec_logits": ("decoder", whole),
}

ADAPTER = Adapter(
    build=build,
    loss="weighted_cross_entropy",
    captures=CAPTURES,
    outputs={"output.logits": resized},
    training_outputs={"output.train_logits": resized},
)
