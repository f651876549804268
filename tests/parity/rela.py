"""Recorded tensors of the official ReLA code (branch main, commit 3ca9551) and where our model computes them."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from amltrain.losses import RegionLoss
from amltrain.models.backbones.swin import LanguageSwin, Swin
from amltrain.models.backbones.text import build_bert
from amltrain.models.layers.deformable import PixelDecoder
from amltrain.models.layers.region_decoder import RegionDecoder
from amltrain.models.rela import ReLA
from amltrain.records import Batch, ModelOutput
from tests.parity.compare import Adapter, Read


def build(config: Mapping[str, Any]) -> ReLA:
    swin, bert, pixel, predictor = (config[key] for key in ("swin", "bert", "pixel_decoder", "predictor"))
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
    backbone = LanguageSwin(vision, text_dim=config["pwam"]["text_dim"], gate_std=0.0)
    return ReLA(
        backbone=backbone,
        text_encoder=text,
        pixel_decoder=PixelDecoder(
            backbone.channels,
            dim=pixel["conv_dim"],
            mask_dim=pixel["mask_dim"],
            layers=pixel["layers"],
            heads=pixel["heads"],
            feedforward=pixel["ffn"],
        ),
        region_decoder=RegionDecoder(
            dim=predictor["hidden"],
            mask_dim=pixel["mask_dim"],
            text_dim=bert["hidden_size"],
            regions=predictor["queries"],
            layers=predictor["layers"],
            heads=predictor["heads"],
            feedforward=predictor["ffn"],
        ),
        trained_text_layers=None,
    )


def batch(recorded: Mapping[str, Tensor]) -> Batch:
    count = len(recorded["input.ids"])
    target = recorded.get("input.gt_mask", torch.zeros_like(recorded["input.image"][:, :1]))
    return Batch(
        image=recorded["input.image"],
        input_ids=recorded["input.ids"],
        text_mask=recorded["input.mask"].bool(),
        target=(target[:, 0] * 255).to(torch.uint8),
        no_target=recorded["input.no_target"].bool(),
        sample_id=torch.arange(count),
        random_key=torch.arange(count),
        geometry=torch.zeros(count, 6, dtype=torch.float64),
    )


def whole(inputs: tuple[Any, ...], output: Any) -> Tensor:
    return output


def channels_first(inputs: tuple[Any, ...], output: Any) -> Tensor:
    return output.permute(0, 3, 1, 2)


def item(index: int) -> Read:
    return lambda inputs, output: output[index]


def scale(index: int) -> Read:
    return lambda inputs, output: output[1][index]


def state_before(inputs: tuple[Any, ...], output: Any) -> Tensor:
    return inputs[0]


def blocked(inputs: tuple[Any, ...], output: Any) -> Tensor:
    return inputs[3].to(torch.uint8)


def minimap_target(output: ModelOutput, batch: Batch) -> Tensor:
    return RegionLoss.minimap_target(batch.target >= 128, output)


CAPTURES: dict[str, tuple[str, Read]] = {
    "inter.lang_feat": ("text_encoder.encoder", lambda inputs, output: output.last_hidden_state),
    **{f"inter.trunk_stage{i + 1}": (f"backbone.swin.layers.{i}", channels_first) for i in range(4)},
    **{f"inter.res{i + 2}": ("backbone", item(i)) for i in range(4)},
    "inter.mask_features": ("pixel_decoder", item(0)),
    **{f"inter.ms{i}": ("pixel_decoder", scale(i)) for i in range(3)},
    "inter.dec_state0": ("region_decoder.layers.0", state_before),
    **{f"inter.dec_state{i + 1}": (f"region_decoder.layers.{i}", whole) for i in range(4)},
    **{f"inter.attn_block{i}": (f"region_decoder.layers.{i}", blocked) for i in range(4)},
    "inter.pred_masks_lowres": ("region_decoder", item(0)),
}
OUTPUTS = {
    "output.nt_logits": lambda output, batch: output.aux["no_target"],
    "inter.minimap_logits": lambda output, batch: output.aux["minimap"],
    "inter.minimap_target": minimap_target,
}

ADAPTER = Adapter(
    build=build,
    loss="rela",
    captures=CAPTURES,
    batch=batch,
    outputs=OUTPUTS,
    exact=("inter.attn_block", "inter.minimap_target"),
    left_out={
        "output.logits_lang_weight_dropped": "tests/models/test_rela.py compares it",
        "output.loss_parts": "tests/models/test_rela.py compares it",
        "inter.attn_block4": "of the last layer, which nothing reads: our model does not compute it",
    },
)
