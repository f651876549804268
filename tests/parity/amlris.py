"""Compare AML's preset `released` with tensors recorded from the AMLRIS release (commit 930e56b).

    python tests/parity/amlris.py CASE.safetensors [--weights caris_tiny.safetensors] [--config components.json]

A case holds components (`attn.*`, `mask.*`) or a whole training step (`inter.attention`, `inter.perm*`, `grad_main.*`,
`grad_total.*`). A step's official weights are those of the recorded tiny CARIS unless named. The recorded order of the
weak pixels is fed in; scores, weak pixels, masks, losses and gradients are our own.
Prints a table and exits with 1 if anything is beyond its tolerance. Masks must be equal bit for bit.
"""

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY))

from amltrain.losses import create_loss  # noqa: E402
from amltrain.methods.aml.masking import select_as_released, split_blocks, weak_pixels  # noqa: E402
from amltrain.methods.aml.method import AML  # noqa: E402
from amltrain.methods.aml.options import AMLOptions  # noqa: E402
from amltrain.methods.aml.similarity import LinearProjection, PatchScorer  # noqa: E402
from amltrain.methods.base import (  # noqa: E402
    build_method,
    mask_image,
)
from amltrain.records import AlignmentFeatures, Batch  # noqa: E402
from tests.parity import compare  # noqa: E402

TAU, RHO, BLOCK = 0.4, 0.25, 32
LOSS, GRADIENT, ACTIVATION = 2e-6, 5e-4, 2e-5


def released_blocks(scores: Tensor, side: int, permutations: list[Tensor]) -> Tensor:
    """The official code's mask [B, r, c] for scores [B, h, w] and recorded orders, empty where nothing is weak."""
    return select_as_released(split_blocks(weak_pixels(scores, (side, side), TAU), BLOCK), RHO, None, permutations)


def exact(name: str, ours: Tensor, theirs: Tensor) -> compare.Row:
    return compare.row(name, ours.float(), theirs.float(), 0.0, relative=False)


def compare_scores(recorded: Mapping[str, Tensor]) -> list[compare.Row]:
    """`attn.*`: token probabilities and their maximum."""
    weight, bias = recorded["attn.text_proj.weight"], recorded["attn.text_proj.bias"]
    scorer = PatchScorer(LinearProjection(*weight.shape), temperature=1.0, normalize=False, score_padding=True)
    scorer.projection.load_state_dict({"weight": weight, "bias": bias})
    text = recorded["attn.l_feats"]
    features = AlignmentFeatures(recorded["attn.vis_feat"], text, torch.ones(text.shape[:2], dtype=torch.bool))
    probabilities = scorer.logits(features).softmax(-1)
    return [
        compare.row("attn.scores", probabilities, recorded["attn.scores"], ACTIVATION, relative=False),
        compare.row("attn.relevance", scorer(features), recorded["attn.relevance"], ACTIVATION, relative=False),
    ]


def compare_masks(recorded: Mapping[str, Tensor]) -> list[compare.Row]:
    """`mask.SIDE.PATTERN.*`: zeroed patches and, where recorded, the masked image."""
    rows = []
    for name in recorded:
        if not name.endswith(".relevance") or not name.startswith("mask."):
            continue
        case = name.removesuffix(".relevance")
        side = int(case.split(".")[1])
        permutation = recorded.get(f"{case}.perm", torch.zeros(0, dtype=torch.long))
        blocks = released_blocks(recorded[name][None], side, [permutation])
        rows.append(exact(f"{case}.zeroed", blocks[0], recorded[f"{case}.zeroed"]))
        image, theirs = recorded.get(f"mask.x{side}"), recorded.get(f"{case}.masked_image")
        if image is not None and theirs is not None:
            masked = mask_image(image, blocks, BLOCK)
            rows.append(
                exact(f"{case}.masked_image", masked if theirs.shape[1] == 3 else masked[:, :1, ::32, ::32], theirs)
            )
    return rows


def compare_attention(recorded: Mapping[str, Tensor]) -> list[compare.Row]:
    """`mask.CASE.attention` [B, n, T]: masks from token probabilities, several samples at once."""
    rows = []
    nothing = torch.zeros(0, dtype=torch.long)
    for name in recorded:
        if not (name.startswith("mask.") and name.endswith(".attention")):
            continue
        case = name.removesuffix(".attention")
        grid = round(recorded[name].shape[1] ** 0.5)
        scores = recorded[name].amax(-1).unflatten(1, (grid, grid))
        only = recorded.get(f"{case}.perm", nothing)
        permutations = [recorded.get(f"{case}.perm_sample{i}", only) for i in range(len(scores))]
        blocks = released_blocks(scores, grid * BLOCK, permutations)
        if f"{case}.zeroed" in recorded:
            theirs = recorded[f"{case}.zeroed"]
            rows.append(exact(f"{case}.zeroed", blocks.reshape(theirs.shape), theirs))
    return rows


INPUTS = ("attn.l_feats", "attn.vis_feat", "attn.text_proj.", "mask.x", "input.", "aug.", "inter.perm")
INPUT_ENDS = (".relevance", ".attention", ".perm")


def not_compared(recorded: Mapping[str, Tensor], rows: list[compare.Row]) -> list[str]:
    """Recorded tensors that are neither compared nor fed in."""
    compared = {row.name for row in rows}
    fed = [n for n in recorded if n.startswith(INPUTS) or (n.startswith("mask.") and n.endswith(INPUT_ENDS))]
    fed = [n for n in fed if n not in ("attn.relevance", "attn.scores")] + [n for n in recorded if ".perm_sample" in n]
    return [n for n in recorded if n not in compared and n not in fed and n not in compare.official_weights(recorded)]


class RecordedTask(AML):
    """The task with recorded orders of the weak pixels in place of its own draw; keeps what a comparison looks at."""

    permutations: list[Tensor]
    seen: dict[str, Tensor]

    def blocks(self, scores: Tensor, batch: Batch, factors: Tensor | None = None) -> Tensor:
        return released_blocks(scores, batch.image.shape[-1], self.permutations)

    def masked_image(self, image: Tensor, blocks: Tensor, scores: Tensor) -> Tensor:
        self.seen["inter.masked_image"] = super().masked_image(image, blocks, scores)
        return self.seen["inter.masked_image"]


def build_recorded_task(
    config: Mapping[str, Any], weights: Mapping[str, Tensor], recorded: Mapping[str, Tensor]
) -> tuple[RecordedTask, dict[str, str]]:
    """The task around the recorded CARIS, and official -> our parameter names."""
    model, renamed = compare.load_model(compare.load_adapter("caris"), config, weights)
    task = build_method("aml", model, create_loss("weighted_cross_entropy"), AMLOptions(preset="released"))
    task.scorer.projection.load_state_dict(
        {"weight": recorded["aug.text_proj.weight"], "bias": recorded["aug.text_proj.bias"]}
    )
    task.__class__ = RecordedTask
    task.permutations = [recorded[name] for name in sorted(recorded) if name.startswith("inter.perm")]
    task.seen = {}
    return task, renamed


def gradients(task: RecordedTask, loss: Tensor) -> dict[str, Tensor]:
    named = [(name, p) for name, p in task.model.named_parameters() if p.requires_grad]
    grads = torch.autograd.grad(loss, [p for _, p in named], allow_unused=True)
    return {name: grad for (name, _), grad in zip(named, grads, strict=True) if grad is not None}


def compare_step(
    config: Mapping[str, Any], weights: Mapping[str, Tensor], recorded: Mapping[str, Tensor]
) -> list[compare.Row]:
    """Scores, mask, logits of both passes, both losses, gradients of the first half and of the whole step."""
    task, renamed = build_recorded_task(config, weights, recorded)
    batch = compare.default_batch(recorded)
    keep = task.seen
    task.scorer.projection.register_forward_hook(lambda _, __, out: keep.update({"inter.attention": out.softmax(-1)}))
    outputs: list[Tensor] = []
    task.loss.register_forward_hook(lambda _, inputs, __: outputs.append(inputs[0].logits))
    result = task(batch)
    keep["output.logits_main"], keep["output.logits_proxy"] = outputs
    keep["output.loss_main"], keep["output.loss_proxy"] = result["clean_loss"], result["masked_loss"]

    rows = [exact("inter.masked_image", keep["inter.masked_image"], recorded["inter.masked_image"])]
    for name in ("inter.attention", "output.logits_main", "output.logits_proxy"):
        rows.append(compare.row(name, keep[name], recorded[name], ACTIVATION, relative=False))
    for name in ("output.loss_main", "output.loss_proxy"):
        rows.append(compare.row(name, keep[name], recorded[name], LOSS, relative=False))
    clean = task.loss(task.model(batch), batch)["loss"] * task.clean_loss_weight
    for prefix, ours in (("grad_main.", gradients(task, clean)), ("grad_total.", gradients(task, result["loss"]))):
        for name, theirs in recorded.items():
            if name.startswith(prefix):
                rows.append(
                    compare.row(name, ours[renamed[name.removeprefix(prefix)]], theirs, GRADIENT, relative=True)
                )
    return rows


def compare_case(
    recorded: Mapping[str, Tensor], config: Mapping[str, Any], weights: Mapping[str, Tensor]
) -> list[compare.Row]:
    """Whatever the case holds."""
    rows = []
    if "attn.l_feats" in recorded:
        rows += compare_scores(recorded)
    rows += compare_masks(recorded)
    rows += compare_attention(recorded)
    if "inter.attention" in recorded:
        rows += compare_step(config, weights, recorded)
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("case", type=Path, help="a recorded .safetensors file")
    parser.add_argument("--config", type=Path, help="JSON with the model's sizes (default: components.json beside it)")
    parser.add_argument("--weights", type=Path, help="official CARIS weights (default: the recorded tiny ones)")
    arguments = parser.parse_args()
    if not arguments.case.is_file():
        parser.error(f"{arguments.case} does not exist")
    recorded = compare.read_tensors(arguments.case)
    config, weights = {}, compare.official_weights(recorded)
    if "inter.attention" in recorded:
        beside = arguments.case.with_name("components.json")
        config_file = arguments.config or (
            beside if beside.is_file() else compare.find_beside("caris", arguments.case, ".json")
        )
        config = json.loads(config_file.read_text())["config"]
        model_weights = arguments.weights or compare.find_beside("caris", Path("caris"), ".safetensors")
        weights = compare.official_weights(load_file(model_weights))
    try:
        rows = compare_case(recorded, config, weights)
    except Exception as error:  # a case of another kind: say so, instead of a traceback
        compare.fail(f"{arguments.case} cannot be compared: {type(error).__name__}: {error}")
    if not rows:
        compare.fail(f"{arguments.case} has no attn.*, mask.* or inter.attention to compare")
    print(compare.table(rows))
    beyond = [r.name for r in rows if not r.passed]
    left_out = not_compared(recorded, rows)
    print(f"{len(rows)} compared, {len(beyond)} beyond tolerance; recorded but not compared: {left_out or 'none'}")
    return 1 if beyond else 0


if __name__ == "__main__":
    sys.exit(main())
