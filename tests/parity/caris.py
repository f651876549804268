"""Recorded tensors of the official CARIS code (commit 4b24546) and where our model computes them."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from amltrain.models.backbones.swin import Swin
from amltrain.models.backbones.text import build_bert
from amltrain.models.caris import CARIS
from tests.parity.compare import Adapter, Read


def build(config: Mapping[str, Any]) -> CARIS:
    swin, bert, decoder = config["swin"], config["bert"], config["dec"]
    vision = Swin(
        embed_dim=swin["embed_dim"],
        depths=swin["depths"],
        num_heads=swin["num_heads"],
        window_size=swin["window_size"],
        drop_path_rate=0.0,
    )
    text = build_bert(
        vocab_size=bert["vocab_size"],
        hidden_size=bert["hidden_size"],
        layers=bert["num_hidden_layers"],
        heads=bert["num_attention_heads"],
        intermediate_size=bert["intermediate_size"],
        max_positions=bert["max_position_embeddings"],
        dropout=0.0,
    )
    return CARIS(vision=vision, text=text, dim=decoder["feat"], layers=decoder["layers"], heads=decoder["heads"])


def whole(inputs: tuple[Any, ...], output: Any) -> Tensor:
    return output


def first(inputs: tuple[Any, ...], output: Any) -> Tensor:
    return output[0]


def map_of(stage: int) -> Read:
    return lambda inputs, output: output[stage]


def tokens(start: int | None, stop: int | None) -> Read:
    """Part of the text stream of a fusion layer: the last five of its entries are the decoder's prompts."""
    return lambda inputs, output: output[1][:, start:stop]


def residual_of_deformable(inputs: tuple[Any, ...], output: Any) -> Tensor:
    return inputs[0]


def mask_query(index: int) -> Read:
    return lambda inputs, output: output[:, index : index + 1]


CAPTURES: dict[str, tuple[str, Read]] = {
    "inter.patch_embed": ("vision.patch_embed", lambda inputs, output: output.permute(0, 3, 1, 2)),
    "inter.swin_stage0_block0": ("vision.layers.0.blocks.0", whole),
    "inter.swin_stage0_block1_shifted": ("vision.layers.0.blocks.1", whole),
    "inter.swin_merge0": ("vision.layers.0.downsample", whole),
    **{f"inter.vis{i}": ("vision", map_of(i)) for i in range(4)},
    "inter.cond_prompts": ("prompts", whole),
    "inter.bert_embeddings": ("text.embeddings", whole),
    "inter.bert_layer0": (
        "text.encoder.layer.0",
        lambda inputs, output: output[0] if isinstance(output, tuple) else output,
    ),
    "inter.l_feats_with_prompts": ("text.encoder", lambda inputs, output: output.last_hidden_state),
    **{f"inter.input_conv{i}": (f"decoder.input_convs.{i}", whole) for i in range(3)},
    "inter.lang_in": ("decoder.lang_in_norm", whole),
    "inter.layer0_l_norm1": ("decoder.encoder.0.l_norm1", whole),
    "inter.layer0_v_norm2": ("decoder.encoder.0.v_norm2", whole),
    "inter.layer0_msda_with_residual": ("decoder.encoder.0.v_norm1", residual_of_deformable),
    **{f"inter.layer{i}_vis": (f"decoder.encoder.{i}", first) for i in range(2)},
    **{f"inter.layer{i}_lang": (f"decoder.encoder.{i}", tokens(None, -5)) for i in range(2)},
    **{f"inter.layer{i}_prompts": (f"decoder.encoder.{i}", tokens(-5, None)) for i in range(2)},
    "inter.lateral": ("decoder.lateral_convs.0", whole),
    "inter.fpn_out": ("decoder.output_convs.0", whole),
    "inter.mask_feature": ("decoder.mask_feature", whole),
    "inter.query_bg": ("decoder.lang_embed", mask_query(0)),
    "inter.query_fg": ("decoder.lang_embed", mask_query(1)),
}

ADAPTER = Adapter(
    build=build,
    loss="weighted_cross_entropy",
    captures=CAPTURES,
    left_out={"inter.sine_pos": "computed inside a function; inter.layer0_msda_with_residual depends on it"},
)
