"""Compare a model with tensors recorded from its official release.

    python tests/parity/compare.py MODEL CASE.safetensors [--config tiny.json] [--weights tiny.safetensors]

MODEL is a file beside this one (caris, detris, ...). A case holds `input.*`, some of `inter.*`, `output.*`, `grad.*`
and the official weights under their official keys; a case without weights borrows those of the tiny case of its folder.
`train.logits` and `post.*` were recorded in training mode: the logits, and batch norms' statistics after that forward.
`f64.*` tensors, where a case has them, were recorded in float64 and are compared in float64.
Prints a table and exits with 1 if anything is beyond its tolerance.
"""

import argparse
import importlib
import json
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY))

from amltrain.losses import create_loss, upsample_logits  # noqa: E402
from amltrain.models import RISModel  # noqa: E402
from amltrain.records import Batch, ModelOutput  # noqa: E402

RECORDED = ("input.", "inter.", "output.", "grad.", "train.", "post.", "f64.")
Read = Callable[[tuple[Any, ...], Any], Tensor]


@dataclass
class Adapter:
    """How one baseline's recorded case maps onto our model.

    build       config of the case's JSON -> model of that size, every dropout and drop-path 0
    loss        name of the loss in amltrain.losses
    captures    recorded name -> (module path, function of the module's inputs and output -> tensor shaped as recorded)
    batch       recorded tensors -> Batch; the default reads input.image, input.ids, input.mask, input.target
    outputs     recorded name -> function of the model's output and the batch; the default gives output.logits,
                output.logits_resized and output.pred
    absolute    tolerance of activations and outputs, float32
    tolerances  start of a recorded name -> its own tolerance instead; the first that fits
    training    tolerance of `train.logits`, `output.train_logits` and `post.*` (absolute): batch norms amplify rounding
    loss_tolerance, gradient   tolerance of the loss (absolute) and of gradients (relative to each tensor's largest)
    double      tolerance of everything in float64 (relative to each tensor's largest value, at least 1)
    """

    build: Callable[[Mapping[str, Any]], RISModel]
    loss: str
    captures: Mapping[str, tuple[str, Read]] = field(default_factory=dict)
    batch: Callable[[Mapping[str, Tensor]], Batch] | None = None
    outputs: Mapping[str, Callable[[ModelOutput, Batch], Tensor]] = field(default_factory=dict)
    absolute: float = 2e-5
    tolerances: Mapping[str, float] = field(default_factory=dict)
    training: float = 1e-4
    loss_tolerance: float = 2e-6
    gradient: float = 5e-4
    double: float = 1e-9


class Row(NamedTuple):
    name: str
    absolute: float
    relative: float
    tolerance: str
    passed: bool


def default_batch(recorded: Mapping[str, Tensor]) -> Batch:
    image = recorded["input.image"]
    count = len(image)
    target = recorded.get("input.target", torch.zeros(count, *image.shape[-2:]))
    if "input.mask" in recorded:
        mask = recorded["input.mask"].bool()
    else:
        mask = torch.ones_like(recorded["input.ids"], dtype=torch.bool)
    return Batch(
        image=image,
        input_ids=recorded["input.ids"],
        text_mask=mask.reshape(recorded["input.ids"].shape),
        target=(target.reshape(count, *target.shape[-2:]).float() * 255).round().to(torch.uint8),
        no_target=torch.zeros(count, dtype=torch.bool),
        sample_id=torch.arange(count),
        random_key=torch.arange(count),
        geometry=torch.zeros(count, 6, dtype=torch.float64),
    )


def default_outputs() -> dict[str, Callable[[ModelOutput, Batch], Tensor]]:
    def resized(output: ModelOutput, batch: Batch) -> Tensor:
        if output.logits.dtype == torch.float64:
            return nn.functional.interpolate(
                output.logits, size=batch.image.shape[-2:], mode="bilinear", align_corners=True
            )
        return upsample_logits(output.logits, batch.image.shape[-2:])

    return {
        "output.logits": lambda output, batch: output.logits,
        "output.logits_resized": resized,
        "output.pred": lambda output, batch: resized(output, batch).argmax(1).to(torch.uint8),
    }


def load_adapter(model: str) -> Adapter:
    try:
        return importlib.import_module(f"tests.parity.{model}").ADAPTER
    except ModuleNotFoundError as error:
        known = sorted(p.stem for p in Path(__file__).parent.glob("*.py") if "ADAPTER = " in p.read_text())
        raise SystemExit(f"no parity adapter for {model!r}; known: {', '.join(known)}") from error


def find_beside(model: str, case: Path, suffix: str) -> Path:
    """The case's own file of that suffix, else the tiny one of its folder, else the recorded tiny one."""
    shared = Path(os.environ.get("AMLTRAIN_SHARED", REPOSITORY.parent / "shared"))
    candidates = [
        case.with_suffix(suffix),
        case.parent / f"tiny{suffix}",
        shared / "goldens" / model / f"tiny{suffix}",
    ]
    for path in candidates:
        if path.is_file():
            return path
    raise SystemExit(f"no {suffix} file for {case}; looked at {', '.join(map(str, candidates))}; name it with a flag")


def read_config(path: Path) -> Mapping[str, Any]:
    """The sizes of a case: the JSON's "config" where that is an object, else all of it."""
    content = json.loads(path.read_text())
    return content["config"] if isinstance(content.get("config"), dict) else content


def official_weights(recorded: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key: value for key, value in recorded.items() if not key.startswith(RECORDED)}


def load_model(adapter: Adapter, config: Mapping[str, Any], weights: Mapping[str, Tensor]) -> tuple[RISModel, dict]:
    model = adapter.build(config)
    conversion = model.convert_state_dict(weights)
    if conversion.unmatched or conversion.missing:
        raise SystemExit(f"weights do not fit: unmatched {conversion.unmatched}, missing {conversion.missing}")
    model.load_state_dict(conversion.state_dict)
    return model, conversion.renamed


def row(name: str, ours: Tensor, theirs: Tensor, tolerance: float, relative: bool) -> Row:
    ours, theirs = ours.detach().reshape(theirs.shape).double(), theirs.double()
    difference = (ours - theirs).abs().max().item()
    largest = theirs.abs().max().item()
    measured = difference / max(largest, 1e-12) if relative else difference
    passed = bool(measured <= tolerance)  # NaN fails
    return Row(
        name, difference, difference / max(largest, 1e-12), f"{'rel' if relative else 'abs'} {tolerance:.0e}", passed
    )


def run(adapter: Adapter, model: RISModel, batch: Batch, names: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Evaluation forward: the recorded activations and outputs, by recorded name."""
    found: dict[str, Tensor] = {}

    def keep(name: str, read: Read) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
        def hook(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            found.setdefault(name, read(inputs, output).detach().clone())

        return hook

    hooks = [
        model.get_submodule(path).register_forward_hook(keep(name, read))
        for name, (path, read) in adapter.captures.items()
        if name in names
    ]
    model.eval()
    with torch.no_grad():
        output = model(batch)
    for hook in hooks:
        hook.remove()
    for name, read in {**default_outputs(), **adapter.outputs}.items():
        if name in names:
            found[name] = read(output, batch)
    return found


class Step(NamedTuple):
    """One forward and backward pass in training mode; gradients by our names."""

    logits: Tensor
    loss: Tensor
    gradients: dict[str, Tensor]


def backward(adapter: Adapter, model: RISModel, batch: Batch) -> Step:
    model.train()
    model.zero_grad()
    output = model(batch)
    loss = create_loss(adapter.loss)(output, batch)["loss"]
    loss.backward()
    return Step(output.logits, loss, {name: p.grad for name, p in model.named_parameters() if p.grad is not None})


def compare(
    adapter: Adapter, config: Mapping[str, Any], recorded: Mapping[str, Tensor], weights: Mapping[str, Tensor]
) -> list[Row]:
    """One row per recorded tensor that the adapter can reproduce."""
    model, renamed = load_model(adapter, config, weights)
    batch = (adapter.batch or default_batch)(recorded)
    rows = []
    for name, ours in run(adapter, model, batch, recorded).items():
        if name == "output.pred":
            share = (ours.reshape(recorded[name].shape) != recorded[name]).double().mean().item()
            rows.append(Row("output.pred (share of pixels)", share, share, "abs 1e-03", share <= 1e-3))
        else:
            own = (value for start, value in adapter.tolerances.items() if name.startswith(start))
            rows.append(row(name, ours, recorded[name], next(own, adapter.absolute), relative=False))
    gradients = {name: value for name, value in recorded.items() if name.startswith("grad.")}
    if "output.loss" in recorded:
        step = backward(adapter, model, batch)
        rows.append(row("output.loss", step.loss, recorded["output.loss"], adapter.loss_tolerance, relative=False))
        for name, theirs in gradients.items():
            ours = step.gradients[renamed[name[len("grad.") :]]]
            rows.append(row(name, ours, theirs, adapter.gradient, relative=True))
        rows += compare_training(adapter, model, step, recorded, renamed)
    doubles = {name[len("f64.") :]: value for name, value in recorded.items() if name.startswith("f64.")}
    if doubles:
        fresh, _ = load_model(adapter, config, weights)  # the training step has moved the batch norms
        rows += compare_double(adapter, fresh.double(), batch, doubles, renamed)
    return rows


def compare_training(
    adapter: Adapter, model: RISModel, step: Step, recorded: Mapping[str, Tensor], renamed: Mapping[str, str]
) -> list[Row]:
    """The logits in training mode, and what that forward left in the batch norms."""
    state = model.state_dict()
    ours = {name: state[renamed[name[len("post.") :]]] for name in recorded if name.startswith("post.")}
    ours |= {name: step.logits for name in ("train.logits", "output.train_logits") if name in recorded}
    return [row(name, value, recorded[name], adapter.training, relative=False) for name, value in ours.items()]


def compare_double(
    adapter: Adapter, model: RISModel, batch: Batch, recorded: Mapping[str, Tensor], renamed: Mapping[str, str]
) -> list[Row]:
    batch = batch._replace(image=batch.image.double())
    rows = []
    for name, ours in run(adapter, model, batch, recorded).items():
        if recorded[name].dtype == torch.float64:
            rows.append(row(f"f64.{name}", ours, recorded[name], adapter.double, relative=True))
    if any(name.startswith("grad.") for name in recorded):
        ours = backward(adapter, model, batch).gradients
        for name, theirs in recorded.items():
            if name.startswith("grad."):
                # the loss itself computes in float32
                ours_gradient = ours[renamed[name[len("grad.") :]]]
                rows.append(row(f"f64.{name}", ours_gradient, theirs, adapter.gradient, relative=True))
    return rows


def table(rows: list[Row]) -> str:
    width = max(len(r.name) for r in rows)
    lines = [f"{'tensor':{width}}  {'max abs':>9}  {'relative':>9}  {'tolerance':>10}  verdict"]
    lines += [
        f"{r.name:{width}}  {r.absolute:9.2e}  {r.relative:9.2e}  {r.tolerance:>10}  {'ok' if r.passed else 'BEYOND'}"
        for r in rows
    ]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="caris, detris, lavt, rela, ...")
    parser.add_argument("case", type=Path, help="a recorded .safetensors file")
    parser.add_argument("--config", type=Path, help="JSON with the sizes (default: beside the case)")
    parser.add_argument("--weights", type=Path, help="official weights, when the case has none of its own")
    arguments = parser.parse_args()
    if not arguments.case.is_file():
        parser.error(f"{arguments.case} does not exist")
    adapter = load_adapter(arguments.model)
    recorded = load_file(arguments.case)
    config = read_config(arguments.config or find_beside(arguments.model, arguments.case, ".json"))
    weights = official_weights(recorded)
    if arguments.weights or not weights:
        weights = official_weights(load_file(arguments.weights or find_tiny_weights(arguments.model, arguments.case)))
    rows = compare(adapter, config, recorded, weights)
    print(table(rows))
    beyond = [r.name for r in rows if not r.passed]
    compared = {r.name.split(" ")[0] for r in rows}
    left_out = [
        n for n in recorded if n.startswith(("inter.", "output.", "grad.", "train.", "post.")) and n not in compared
    ]
    print(
        f"{len(rows)} compared, {len(beyond)} beyond tolerance; {len(left_out)} recorded but not compared: {left_out}"
    )
    return 1 if beyond or not rows else 0


def find_tiny_weights(model: str, case: Path) -> Path:
    """Weights for a case that has none: the tiny case of its folder, else the recorded one."""
    beside = case.parent / "tiny.safetensors"
    return beside if beside.is_file() and beside != case else find_beside(model, Path(model), ".safetensors")


if __name__ == "__main__":
    sys.exit(main())
