"""Recorded tensors of the official DeRIS code (commit 2406687) and where our model computes them.

Activations of modules that every step calls are compared at the first or the last call.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from amltrain.losses import create_loss
from amltrain.matching import CANDIDATES, MATCH, OTHERS, assign, enlarge_masks, matching_cost
from amltrain.models.backbones.swin import Swin
from amltrain.models.beit3 import BEiT3Encoder
from amltrain.models.deris import BiasedPixelDecoder, DeRIS
from amltrain.models.layers.loopback_decoder import LoopbackDecoder
from amltrain.records import Batch, ModelOutput
from tests.parity.compare import Adapter, Read, ReadOutput, default_batch

CASE: dict[str, Tensor] = {}
"""What a batch cannot say: BEiT-3's pictures, referents one by one and random points of the current case."""
LAST = 3


def build(config: Mapping[str, Any]) -> DeRIS:
    beit3, swin, predictor = config["beit3"], config["swin"], config["predictor"]
    encoder = BEiT3Encoder(
        dim=beit3["dim"],
        depth=beit3["depth"],
        heads=beit3["heads"],
        patch=beit3["patch"],
        table_size=beit3["image"] // beit3["patch"],
        vocab_size=beit3["vocab_size"],
        text_positions=beit3["text_positions"],
    )
    backbone = Swin(
        embed_dim=swin["embed_dim"],
        depths=swin["depths"],
        num_heads=swin["num_heads"],
        window_size=swin["window_size"],
        drop_path_rate=0.0,
    )
    model = DeRIS(
        encoder,
        backbone,
        BiasedPixelDecoder(tuple(backbone.channels), **config["pixel_decoder"]),
        LoopbackDecoder(
            dim=predictor["dim"],
            queries=predictor["queries"],
            layers=predictor["layers"],
            heads=predictor["heads"],
            feedforward=predictor["feedforward"],
        ),
        aligner_feedforward=config["aligner"]["feedforward"],
        aligner_dropout=0.0,
    )
    model.small_picture = lambda batch: CASE["image_small"].to(batch.image.dtype)
    return model


def batch(recorded: Mapping[str, Tensor]) -> Batch:
    CASE.clear()
    CASE.update({name.removeprefix("input."): value for name, value in recorded.items() if name.startswith("input.")})
    return default_batch(recorded)


def instances() -> list[Tensor]:
    return [CASE[f"instances.{i}"] for i in range(len(CASE["image"]))]


KINDS = {MATCH: "match", CANDIDATES: "oversample", OTHERS: "random"}


def recorded_points(stream: int, keys: Tensor, count: int) -> Tensor:
    """Those of one kind and step."""
    step = stream & 0xF
    points = CASE[f"points.{KINDS[stream - step]}.{step}"]
    assert points.shape[:2] == (len(keys), count)
    return points


def recorded_loss() -> Any:
    loss = create_loss("deris", points=CASE["points.match.0"].shape[1])
    loss.draw = recorded_points
    return loss


def criterion() -> Callable[[ModelOutput, Batch], dict[str, Tensor]]:
    loss = recorded_loss()
    return lambda output, batch: loss(output, batch, instances())


def size_of(batch: Batch) -> tuple[int, int]:
    return batch.image.shape[-2], batch.image.shape[-1]


def term(step: int, name: str) -> ReadOutput:
    return lambda output, batch: recorded_loss().terms(output, batch, instances(), step, True)[name]


def total(*names: str) -> ReadOutput:
    return lambda output, batch: torch.stack([criterion()(output, batch)[name] for name in names]).sum()


def cost(step: int, sample: int) -> ReadOutput:
    def read(output: ModelOutput, batch: Batch) -> Tensor:
        masks = enlarge_masks(output.aux[f"masks{step}"][sample, None], size_of(batch))
        targets, points = instances()[sample][None].float(), CASE[f"points.match.{step}"][sample, None]
        return matching_cost(masks, output.aux[f"refer{step}"][sample, None], targets, points)[0]

    return read


def assignment(step: int, sample: int) -> ReadOutput:
    return lambda output, batch: torch.stack(assign(cost(step, sample)(output, batch)))


def union(threshold: float) -> ReadOutput:
    """The final mask at another threshold than the model's."""

    def read(output: ModelOutput, batch: Batch) -> Tensor:
        meant = output.aux[f"refer{LAST}"].softmax(dim=-1)[..., 0] > threshold
        masks = enlarge_masks(output.aux[f"masks{LAST}"], size_of(batch)) >= 0
        return (masks & meant[..., None, None]).any(dim=1).to(torch.uint8)

    return read


def blocked(step: int) -> ReadOutput:
    """The attention mask that is made of a step's masks: of the scale of stride 32, 16, 8, 32."""

    def read(output: ModelOutput, batch: Batch) -> Tensor:
        size = tuple(side // (32, 16, 8)[step % 3] for side in size_of(batch))
        masks = F.interpolate(output.aux[f"masks{step}"], size, mode="bilinear", align_corners=False)
        return (masks < 0).flatten(2).to(torch.uint8)

    return read


def whole(inputs: tuple[Any, ...], output: Any) -> Tensor:
    return output


def flat(inputs: tuple[Any, ...], output: Any) -> Tensor:
    """[B, h, w, C] -> [B, h w, C]."""
    return output.flatten(1, 2)


def item(index: int) -> Read:
    return lambda inputs, output: output[index]


def given(index: int) -> Read:
    return lambda inputs, output: inputs[index]


STEPS = range(LAST + 1)
CAPTURES: dict[str, tuple[str, Read]] = {
    **{f"inter.beit_layer{i}": (f"beit3.encoder.layers.{i}", whole) for i in range(2)},
    "inter.beit_out": ("beit3.encoder.layer_norm", whole),
    "inter.cog_image": ("image", flat),
    "inter.cog_text": ("words", whole),
    "inter.patch_embed": ("swin.patch_embed", lambda inputs, output: output.permute(0, 3, 1, 2)),
    "inter.swin_stage0_block0": ("swin.layers.0.blocks.0", flat),
    "inter.swin_stage0_block1_shifted": ("swin.layers.0.blocks.1", flat),
    "inter.swin_merge0": ("swin.layers.0.downsample", flat),
    "inter.swin_stage3_block1": ("swin.layers.3.blocks.1", flat),
    **{f"inter.vis{i}": ("swin", item(i)) for i in range(4)},
    **{f"inter.input_proj{i}": (f"pixel_decoder.input_proj.{i}", whole) for i in range(3)},
    **{f"inter.pixel_layer{i}": (f"pixel_decoder.layers.{i}", whole) for i in range(2)},
    "inter.fpn_out": ("pixel_decoder.merge", whole),
    "inter.mask_features": ("pixel_decoder.mask_features", whole),
    "inter.fused_mask_features": ("predictor.fuse", whole),
    **{f"inter.layer{i}.cross": (f"predictor.read_image.{i}", whole) for i in range(3)},
    **{f"inter.layer{i}.self": (f"predictor.read_queries.{i}", whole) for i in range(3)},
    **{f"inter.layer{i}.ffn": (f"predictor.feedforward.{i}", whole) for i in range(3)},
    **{f"inter.step{k}.across_batch": (f"predictor.loops.{k}.mix", whole) for k in STEPS},
    **{f"inter.step{k}.mask_pooled": (f"predictor.loops.{k}.mix", given(1)) for k in STEPS},
    **{f"inter.step{k}.text_read": (f"predictor.loops.{k}.words", whole) for k in STEPS},
    **{f"inter.step{k}.queries": (f"predictor.loops.{k}.join", whole) for k in STEPS},
    **{f"inter.step{k}.normed": ("predictor.norm", whole) for k in (0, LAST)},
    **{f"inter.step{k}.kernels": ("predictor.mask_embed", whole) for k in (0, LAST)},
    **{f"inter.aligner_layer{i}": (f"aligner.layers.{i}", whole) for i in range(3)},
    "inter.aligner_out": ("aligner", whole),
}
OUTPUTS: dict[str, ReadOutput] = {
    "output.masks": lambda output, batch: enlarge_masks(output.aux[f"masks{LAST}"], size_of(batch)),
    "output.refer_logits": lambda output, batch: output.aux[f"refer{LAST}"],
    "output.scores": lambda output, batch: output.aux[f"refer{LAST}"].softmax(dim=-1)[..., 0],
    "output.existence": lambda output, batch: output.aux["existence"],
    "output.no_target_probability": lambda output, batch: 1 - output.aux["existence"].sigmoid(),
    "output.mask_thr50": union(0.5),
    "output.mask_thr70": lambda output, batch: (output.logits >= 0).to(torch.uint8),
    **{f"inter.step{k}.mask_logits_quarter": lambda output, batch, k=k: output.aux[f"masks{k}"] for k in STEPS},
    **{f"inter.step{k}.refer_logits": lambda output, batch, k=k: output.aux[f"refer{k}"] for k in STEPS},
    **{f"inter.step{k}.blocked": blocked(k) for k in STEPS},
}
TERMS: dict[str, ReadOutput] = {
    "output.loss_class": total("class"),
    "output.loss_mask": total("mask", "dice"),
    "output.loss_label_nt": total("existence"),
    **{f"output.raw_loss_{name}.step{k}": term(k, name) for k in STEPS for name in ("class", "mask", "dice")},
    **{f"output.cost.{k}.{sample}": cost(k, sample) for k in STEPS for sample in range(3)},
    **{f"output.assign.{k}.{sample}": assignment(k, sample) for k in STEPS for sample in range(3)},
}
BOXES = "of the box head, whose loss has weight 0: our model has none"

ADAPTER = Adapter(
    build=build,
    loss=criterion,
    captures=CAPTURES,
    last=["inter.beit_out", f"inter.step{LAST}.normed", f"inter.step{LAST}.kernels"],
    batch=batch,
    outputs=OUTPUTS,
    training_outputs=TERMS,
    exact=("output.assign", "output.mask_thr", *(f"inter.step{k}.blocked" for k in STEPS)),
    left_out={
        "inter.beit_patches": "computed inside a function; inter.beit_layer0 depends on it",
        "inter.cog_queries": "a parameter's projection, equal for every sample; its gradient is compared",
        "inter.text_position": "computed inside a function; inter.step0.text_read depends on it",
        **{
            f"inter.step{k}.{name}": "a call between; the last step depends on it"
            for k in (1, 2)
            for name in ("normed", "kernels")
        },
        **{f"inter.step{k}.box_raw": BOXES for k in STEPS},
        **dict.fromkeys(("output.boxes", "output.pred_boxes", "output.raw_loss_bbox", "output.raw_loss_giou"), BOXES),
        "output.loss_det": "0, the weight of the box losses",
        "output.loss_perp": "0, a loss that the release never computes",
        "output.object_logits": "read by nothing",
        "output.unused_query_logits": "read by nothing",
        "extra.": "tests/models/test_deris.py compares it",
    },
)
