"""Recorded tensors of the official C3VG code (commit 7738820) and where our model computes them."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from amltrain.losses import create_loss, upsample_logits
from amltrain.matching import corners_of
from amltrain.models.beit3 import BEiT3Encoder
from amltrain.models.c3vg import C3VG
from amltrain.records import Batch, ModelOutput
from tests.parity.compare import Adapter, Read, ReadOutput, default_batch

BOXES: list[Tensor] = []
"""The recorded boxes of the current case."""


def build(config: Mapping[str, Any]) -> C3VG:
    encoder = BEiT3Encoder(
        dim=config["dim"],
        depth=config["layers"],
        heads=config["heads"],
        patch=config["patch_size"],
        table_size=config["img_size"] // config["patch_size"],
        vocab_size=config["vocab_size"],
        text_positions=config["text_positions"],
    )
    return C3VG(
        encoder,
        dim=config["hidden"],
        heads=config["head_heads"],
        feedforward=config["feedforward"],
        dropout=0.0,
    )


def batch(recorded: Mapping[str, Tensor]) -> Batch:
    BOXES[:] = [recorded["input.boxes"]]
    return default_batch(recorded)


def criterion() -> Callable[[ModelOutput, Batch], dict[str, Tensor]]:
    loss = create_loss("c3vg")
    return lambda output, batch: loss(output, batch, BOXES[0])


def whole(inputs: tuple[Any, ...], output: Any) -> Tensor:
    return output


def given(index: int) -> Read:
    return lambda inputs, output: inputs[index]


def item(index: int) -> Read:
    return lambda inputs, output: output[index]


def activated(inputs: tuple[Any, ...], output: Any) -> Tensor:
    return output.relu()


def size_of(batch: Batch) -> tuple[int, int]:
    return batch.image.shape[-2], batch.image.shape[-1]


def resized(name: str) -> ReadOutput:
    return lambda output, batch: upsample_logits(logits_of(output, name), size_of(batch))


def logits_of(output: ModelOutput, name: str) -> Tensor:
    return output.logits if name == "fine" else output.aux["coarse_logits"]


def predicted(name: str) -> ReadOutput:
    return lambda output, batch: (resized(name)(output, batch) >= 0).to(torch.uint8)


def pixels(name: str) -> ReadOutput:
    return lambda output, batch: corners_of(output.aux[name]) * batch.image.shape[-1]


def term(*names: str) -> ReadOutput:
    return lambda output, batch: torch.stack([criterion()(output, batch)[name] for name in names]).sum()


CAPTURES: dict[str, tuple[str, Read]] = {
    "inter.text_embed": ("beit3.text_embed", whole),
    "inter.beit.embedded": ("beit3.encoder.layers.0", given(0)),
    "inter.beit.layer0_attn": ("beit3.encoder.layers.0.self_attn", whole),
    "inter.beit.layer0_ffn": ("beit3.encoder.layers.0.ffn", whole),
    "inter.beit.layer0": ("beit3.encoder.layers.0", whole),
    "inter.beit.layer1": ("beit3.encoder.layers.1", whole),
    "inter.beit.out": ("beit3.encoder.layer_norm", whole),
    "inter.lan_embed": ("words", whole),
    "inter.img_embed": ("image", whole),
    "inter.query_embed": ("query", whole),
    "inter.lan_pool": ("pixel_head", given(1)),
    "inter.proj1.kernel": ("pixel_head.kernel", whole),
    "inter.proj1.visual": ("pixel_head.visual", whole),
    "inter.proj2.visual": ("pixel_head.visual", whole),
    "inter.q2t.self_norm": ("query_words.layers.0.norms.0", whole),
    "inter.q2t.cross_norm": ("query_words.layers.0.norms.1", whole),
    "inter.q2t.ffn_norm": ("query_words.layers.0.norms.2", whole),
    "inter.q2t.out": ("query_words", whole),
    "inter.q2i.self_norm": ("query_image.layers.0.norms.0", whole),
    "inter.q2i.cross_norm": ("query_image.layers.0.norms.1", whole),
    "inter.query": ("query_image", whole),
    "inter.uim.image": ("interaction.image", activated),
    "inter.uim.roi": ("interaction.box", lambda inputs, output: inputs[0].chunk(2, dim=1)[0]),
    "inter.uim.box_coordinates": ("interaction.coordinates", whole),
    "inter.uim.box_feature": ("interaction.box", whole),
    "inter.uim.seg_input": ("interaction.cells", given(0)),
    "inter.uim.seg_embed": ("interaction.cells", whole),
    "inter.uim.box_text": ("interaction.box_words", whole),
    "inter.uim.box_image": ("interaction.box_image", whole),
    **{f"inter.uim.box_image_layer{i}": (f"interaction.box_image.layers.{i}", whole) for i in range(3)},
    **{f"inter.uim.self_layer{i}": (f"interaction.cells_self.layers.{i}", whole) for i in range(3)},
    "inter.uim.self_layer0_norm": ("interaction.cells_self.layers.0.norms.0", whole),
    "inter.uim.box_out": ("interaction", item(0)),
    "inter.uim.seg_out": ("interaction", item(1)),
    "inter.fpn.up4": ("neck.four_times", whole),
    "inter.fpn.up2": ("neck.twice", whole),
    "inter.fpn.down2": ("neck.lateral.3", given(0)),
    "inter.fpn.lateral0": ("neck.lateral.0.1", whole),
    **{f"inter.fpn.c{i + 1}": (f"neck.lateral.{i}", whole) for i in range(4)},
    "inter.dec.first_half_4": ("decoder.steps.0.2", whole),
    "inter.dec.out_4": ("decoder.steps.0", whole),
    "inter.dec.out_3": ("decoder.steps.1", whole),
    "inter.dec.out": ("decoder", whole),
}
OUTPUTS: dict[str, ReadOutput] = {
    "output.logits_first": lambda output, batch: output.aux["coarse_logits"],
    "output.logits_resized": resized("fine"),
    "output.logits_first_resized": resized("coarse"),
    "output.pred": predicted("fine"),
    "output.pred_first": predicted("coarse"),
    "output.box": lambda output, batch: output.aux["box"],
    "output.box_first": lambda output, batch: output.aux["coarse_box"],
    "output.box_pixels": pixels("box"),
    "output.box_first_pixels": pixels("coarse_box"),
}
TERMS: dict[str, ReadOutput] = {
    "output.loss_mask_first": term("mask_coarse"),
    "output.loss_mask_second": term("mask_fine"),
    "output.loss_mask": term("mask_coarse", "mask_fine"),
    "output.loss_bbox_first": term("box_coarse"),
    "output.loss_bbox_second": term("box_fine"),
    "output.loss_det": term("box_coarse", "box_fine"),
    "output.loss_cons_first": term("consistency_coarse"),
    "output.loss_cons_second": term("consistency_fine"),
    "output.loss_cons": term("consistency_coarse", "consistency_fine"),
    "train.box": lambda output, batch: output.aux["box"],
    "train.box_first": lambda output, batch: output.aux["coarse_box"],
    "train.logits_first": lambda output, batch: output.aux["coarse_logits"],
}
WITHOUT_MODULE = "computed inside a function; "

ADAPTER = Adapter(
    build=build,
    loss=criterion,
    captures=CAPTURES,
    last=["inter.beit.out", "inter.proj2.visual"],
    batch=batch,
    outputs=OUTPUTS,
    training_outputs=TERMS,
    exact=("output.pred_first",),
    left_out={
        "inter.vision_embed": WITHOUT_MODULE + "inter.beit.embedded depends on it",
        "inter.position_table_resampled": WITHOUT_MODULE + "inter.beit.embedded depends on it",
        "inter.text_position": WITHOUT_MODULE + "inter.q2t.out depends on it",
        "inter.image_position": WITHOUT_MODULE + "inter.query depends on it",
        "inter.uim.box_mask": WITHOUT_MODULE + "inter.uim.seg_input depends on it",
        "extra.image_alone": "tests/models/test_c3vg.py compares it",
        "extra.text_alone": "tests/models/test_c3vg.py compares it",
    },
)
