"""Tensors recorded from CGFormer (commit 67d3390), its Gumbel noise replayed, and where our model computes them."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from amltrain.models.backbones.swin import LanguageSwin, Swin
from amltrain.models.backbones.text import build_bert
from amltrain.models.cgformer import CGFormer, GroupingDecoder
from amltrain.records import Batch
from tests.parity.compare import Adapter, Read, default_batch

NOISE: list[Tensor] = []
"""Recorded noise of the current case, one tensor per level."""


def build(config: Mapping[str, Any]) -> CGFormer:
    vision = Swin(
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
    decoder = GroupingDecoder(
        vision.channels,
        dim=config["token_dim"],
        text_dim=config["text_dim"],
        tokens=config["num_token"],
        sides=config["pe_shapes"],
        dropout=0.0,
    )
    decoder.noise = lambda keys, level, positions: NOISE[level]
    backbone = LanguageSwin(vision, text_dim=config["text_dim"], heads=config["mha"][0])
    return CGFormer(backbone=backbone, text_encoder=text, decoder=decoder)


def batch(recorded: Mapping[str, Tensor]) -> Batch:
    NOISE[:] = [recorded[f"input.gumbel{level}"] for level in range(3)]
    return default_batch(recorded)


def whole(inputs: tuple[Any, ...], output: Any) -> Tensor:
    return output


def item(index: int) -> Read:
    return lambda inputs, output: output[index]


def flat(inputs: tuple[Any, ...], output: Any) -> Tensor:
    return output.flatten(1, 2)


CAPTURES: dict[str, tuple[str, Read]] = {
    "inter.text_hidden": ("text_encoder.encoder", lambda inputs, output: output.last_hidden_state),
    "inter.stage0_blocks": ("backbone.swin.layers.0", flat),
    **{f"inter.feat{i}": ("backbone", item(i)) for i in range(4)},
    **{f"inter.fuse{i}": (f"decoder.fuses.{i}", whole) for i in range(3)},
    **{f"inter.loaded{i + 1}": (f"decoder.loading.{i}", whole) for i in range(2)},
    "inter.stage1_fused": ("backbone.fusion.1", whole),
    "inter.tokens2": ("decoder.grouping.1.mlp", whole),
    "inter.tokens0": ("decoder.grouping.0", item(0)),
    "inter.map0": ("decoder.grouping.0", item(1)),
    "inter.tokens1": ("decoder.grouping.1", item(0)),
    "inter.map1": ("decoder.grouping.1", item(1)),
    "inter.proj": ("decoder", item(0)),
}

ADAPTER = Adapter(
    build=build,
    loss="cgformer",
    captures=CAPTURES,
    last=["inter.tokens2"],
    batch=batch,
    outputs={
        "inter.map2": lambda output, batch: torch.stack([1 - output.aux["assigned2"], output.aux["assigned2"]], 1)
    },
    left_out={"output.logits_nonoise": "tests/models/test_cgformer.py compares it"},
    double=1e-7,  # activations agree to 1e-14; part of the recorded loss was rounded to float32
)
