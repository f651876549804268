"""Compare a model with tensors recorded from its official code.

    python tests/parity/compare.py MODEL CASE.safetensors

MODEL is a file beside this one (caris, detris, ...). A case contains `input.*`, some of `inter.*`, `output.*`, `grad.*`
and the recorded network's random weights under their official keys; a case without weights borrows those of the tiny
case of its folder. `train.logits` and `post.*` were recorded in training mode: the logits, and batch norms' statistics
after it. `f64.*` were recorded in float64 and are compared in float64. What is beyond its tolerance in float32 is
judged by our own float64 and by what float32 costs it (`judge.py`); the verdict then gives the reason. Where our
parameter is several official ones, or a part of one, gradients are compared in the official form.
The sizes come from the JSON beside the case or beside another recorded case: the first that the weights fit.
Prints a table and every recorded tensor that is not compared, with the reason. Exit code 0: all within tolerance; 1:
something is beyond; 2: the case cannot be compared.
"""

import argparse
import importlib
import json
import os
import re
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY))

from amltrain.losses import create_loss, upsample_logits  # noqa: E402
from amltrain.models import RISModel  # noqa: E402
from amltrain.records import Batch, ModelOutput  # noqa: E402
from tests.parity.judge import NUDGES, Exact, Row, kind_of, nudged_case, row, scale_of  # noqa: E402

RECORDED = ("input.", "extra.", "inter.", "output.", "grad.", "train.", "post.", "f64.", "unpadded.")
NO_RULE = "the adapter has no rule for it"
Read = Callable[[tuple[Any, ...], Any], Tensor]
ReadOutput = Callable[[ModelOutput, Batch], Tensor]


@dataclass
class Adapter:
    """How one baseline's recorded case maps onto our model.

    build       config of the case's JSON -> model of that size, every dropout and drop-path 0
    loss        name of the loss in amltrain.losses, or a function that builds a criterion
    loss_kwargs its arguments
    captures    recorded name -> (module path, function of the module's inputs and output -> tensor shaped as recorded)
    last        recorded names read at the last call of their module instead of the first
    batch       recorded tensors -> Batch; the default reads input.image, input.ids, input.mask, input.target
    outputs     recorded name -> function of the model's output and the batch; the default gives output.logits,
                output.logits_resized and output.pred
    training_outputs   the same for recorded outputs of the training forward
    value       tolerance of activations, outputs, losses and statistics in float32
    gradient    tolerance of gradients in float32
    double      tolerance of everything in float64; all three relative to each tensor's largest value
    exact       starts of recorded names whose tensors must be equal: decisions, not sums
    left_out    start of a recorded name that is not compared here -> why, e.g. the test that compares it
    """

    build: Callable[[Mapping[str, Any]], RISModel]
    loss: str | Callable[[], Callable[[ModelOutput, Batch], dict[str, Tensor]]]
    loss_kwargs: Mapping[str, Any] = field(default_factory=dict)
    captures: Mapping[str, tuple[str, Read]] = field(default_factory=dict)
    last: Collection[str] = ()
    batch: Callable[[Mapping[str, Tensor]], Batch] | None = None
    outputs: Mapping[str, ReadOutput] = field(default_factory=dict)
    training_outputs: Mapping[str, ReadOutput] = field(default_factory=dict)
    value: float = 5e-6
    gradient: float = 1e-4
    double: float = 1e-9
    exact: tuple[str, ...] = ()
    left_out: Mapping[str, str] = field(default_factory=dict)

    def tolerance(self, name: str, dtype: torch.dtype) -> float:
        """How far a tensor of that recorded name may be off, as a share of its largest value."""
        if name.startswith(self.exact) and self.exact:
            return 0.0
        if dtype == torch.float64:
            return self.double
        return self.gradient if kind_of(name) == "grad" else self.value

    def why_left_out(self, name: str) -> str | None:
        return next((why for start, why in self.left_out.items() if name.startswith(start)), None)


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


def default_outputs() -> dict[str, ReadOutput]:
    def resized(output: ModelOutput, batch: Batch) -> Tensor:
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
        known = sorted(p.stem for p in Path(__file__).parent.glob("*.py") if "\nADAPTER = " in p.read_text())
        if error.name != f"tests.parity.{model}":
            raise
        elsewhere = [path.relative_to(REPOSITORY) for path in REPOSITORY.glob(f"tests/*/test_{model}.py")]
        compared = f"; {elsewhere[0]} compares its recorded tensors" if elsewhere else ""
        fail(f"no parity adapter for {model!r}{compared}; known: {', '.join(known)}")
    except AttributeError:
        fail(f"tests/parity/{model}.py compares its cases itself: python tests/parity/{model}.py CASE.safetensors")


def fail(sentence: str) -> NoReturn:
    """End with a sentence and exit code 2: nothing could be compared."""
    print(f"error: {sentence}", file=sys.stderr)
    raise SystemExit(2)


def shared_goldens(model: str) -> Path:
    """The folder with a model's recorded cases."""
    return Path(os.environ.get("AMLTRAIN_SHARED", REPOSITORY.parent / "shared")) / "goldens" / model


def find_beside(model: str, case: Path, suffix: str) -> Path:
    """The case's own file of that suffix, else the tiny one of its folder, else the recorded tiny one."""
    candidates = [case.with_suffix(suffix), case.parent / f"tiny{suffix}", shared_goldens(model) / f"tiny{suffix}"]
    for path in candidates:
        if path.is_file():
            return path
    fail(f"no {suffix} file for {case}; looked at {', '.join(map(str, candidates))}; name it with a flag")


def find_config(adapter: Adapter, model: str, case: Path, weights: Mapping[str, Tensor]) -> Mapping[str, Any]:
    """The sizes of a case: the first JSON beside it, or beside the recorded cases, that its weights fit."""
    found = [case.with_suffix(".json"), *sorted(case.parent.glob("*.json"))]
    found += [shared_goldens(model) / "tiny.json", *sorted(shared_goldens(model).glob("*.json"))]
    looked_at = [path for path in dict.fromkeys(found) if path.is_file()]
    for path in looked_at:
        try:
            config = read_config(path)
            load_model(adapter, config, weights)
        except Exception:  # not a case's JSON, or the sizes of another case: adapters raise many kinds
            continue
        return config
    fail(f"no JSON has sizes that the weights of {case.name} fit; looked at {', '.join(map(str, looked_at)) or 'none'}")


def read_config(path: Path) -> Mapping[str, Any]:
    """The case's JSON; what lies in its "config", if that is an object, comes to the top."""
    content = json.loads(path.read_text())
    return content | content["config"] if isinstance(content.get("config"), dict) else content


def official_weights(recorded: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key: value for key, value in recorded.items() if not key.startswith(RECORDED)}


def load_model(adapter: Adapter, config: Mapping[str, Any], weights: Mapping[str, Tensor]) -> tuple[RISModel, dict]:
    model = adapter.build(config)
    conversion = model.convert_state_dict(weights)
    if conversion.unmatched or conversion.missing:
        fail_text = f"unmatched {conversion.unmatched[:3]}, missing {conversion.missing[:3]}"
        raise ValueError(f"the official weights do not fit the model: {fail_text}")
    model.load_state_dict(conversion.state_dict)
    return model, conversion.renamed


def find_places(model: RISModel, weights: Mapping[str, Tensor]) -> dict[str, list[tuple[str, Tensor, Tensor]]]:
    """Where every official element lies in our model: official key -> [(our name, positions there, positions in it)].

    Converts a state dict whose values are numbers of elements, so that parameters which are joined, split or reshaped
    on the way are followed too. Keys whose values the conversion changes (resampled tables) are left out.
    """
    starts, tagged, count = {}, {}, 1
    for key, value in weights.items():
        starts[key] = count
        tagged[key] = torch.arange(count, count + value.numel(), dtype=torch.float64).reshape(value.shape)
        count += value.numel()
    bounds = torch.tensor([*starts.values(), count], dtype=torch.float64)
    keys, places = list(starts), {key: [] for key in starts}
    for name, tags in model.convert_state_dict(tagged).state_dict.items():
        tags = tags.flatten().double()
        if not torch.equal(tags, tags.round()) or tags.numel() == 0:
            continue
        owners = torch.bucketize(tags, bounds, right=True) - 1
        for owner in owners.unique().tolist():
            if 0 <= owner < len(keys):
                ours = (owners == owner).nonzero()[:, 0]
                places[keys[owner]].append((name, ours, (tags[ours] - bounds[owner]).long()))
    return places


def officially(
    found: Mapping[str, Tensor], places: Mapping[str, list[tuple[str, Tensor, Tensor]]], wanted: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Gradients and statistics under official keys, copies of one official tensor added up."""
    results = {}
    for name, theirs in wanted.items():
        kind, _, key = name.partition(".")
        if kind not in ("grad", "post"):
            continue
        parts = [part for part in places.get(key, ()) if f"{kind}.{part[0]}" in found]
        if not parts or torch.cat([at for _, _, at in parts]).unique().numel() != theirs.numel():
            continue
        whole = found[f"{kind}.{parts[0][0]}"].new_zeros(theirs.numel())
        for ours, here, there in parts:
            whole.index_add_(0, there, found[f"{kind}.{ours}"].detach().flatten()[here])
        results[name] = whole
    return results


def run(adapter: Adapter, model: RISModel, batch: Batch, names: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Evaluation forward: the recorded activations and outputs, by recorded name."""
    found: dict[str, Tensor] = {}

    def keep(name: str, read: Read) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
        def hook(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            if name not in found or name in adapter.last:
                found[name] = read(inputs, output).detach().clone()

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
    for name in names:
        if alone := re.fullmatch(r"extra\.logits_sample(\d+)_alone", name):
            index = int(alone[1])
            with torch.no_grad():
                found[name] = model(batch.mapped(lambda value: value[index : index + 1])).logits  # noqa: B023
    return found


def backward(adapter: Adapter, model: RISModel, batch: Batch, names: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Training forward and backward under recorded names: outputs, loss, gradients, statistics; the last two as
    `grad.` and `post.` + our name."""
    torch.set_default_dtype(batch.image.dtype)  # so that the loss's own constants are as exact as its inputs
    criterion = create_loss(adapter.loss, **adapter.loss_kwargs) if isinstance(adapter.loss, str) else adapter.loss()
    torch.set_default_dtype(torch.float32)
    output = model.train()(batch)
    loss = criterion(output, batch)["loss"]
    loss.backward()
    found = {"output.loss": loss, "train.logits": output.logits, "output.train_logits": output.logits}
    found |= {name: read(output, batch) for name, read in adapter.training_outputs.items() if name in names}
    found |= {f"post.{name}": value for name, value in model.state_dict().items()}
    return found | {f"grad.{name}": p.grad for name, p in model.named_parameters() if p.grad is not None}


def compare(
    adapter: Adapter, config: Mapping[str, Any], recorded: Mapping[str, Tensor], weights: Mapping[str, Tensor]
) -> list[Row]:
    """One row per recorded tensor that the adapter can reproduce; one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        case = Case(adapter, config, weights, (adapter.batch or default_batch)(recorded))
        rows = case.recheck(case.compare(torch.float32, recorded), recorded)
        doubles = {name[len("f64.") :]: value for name, value in recorded.items() if name.startswith("f64.")}
        return rows + [r._replace(name=f"f64.{r.name}") for r in case.compare(torch.float64, doubles)]
    finally:
        torch.set_num_threads(threads)


@dataclass
class Case:
    """A recorded case: the model's sizes, its official weights and its inputs."""

    adapter: Adapter
    config: Mapping[str, Any]
    weights: Mapping[str, Tensor]
    batch: Batch

    def measure(self, dtype: torch.dtype, names: Mapping[str, Tensor], nudge: int | None = None) -> dict[str, Tensor]:
        """Our results under recorded names; nudge: seed of a change in the last bit of weights and image."""
        weights, batch = self.weights, self.batch
        if nudge is not None:
            weights, batch = nudged_case(weights, batch, nudge)
        model, _ = load_model(self.adapter, self.config, weights)
        places = find_places(model, weights)
        model.to(dtype)
        batch = batch._replace(image=batch.image.to(dtype))
        found = run(self.adapter, model, batch, names)
        if "output.loss" in names:
            trained = backward(self.adapter, model, batch, names)
            found |= {name: trained[name].detach() for name in names if name in trained}
            found |= officially(trained, places, names)
        return found

    def compare(self, dtype: torch.dtype, recorded: Mapping[str, Tensor]) -> list[Row]:
        if not recorded:
            return []
        found, rows = self.measure(dtype, recorded), []
        scales = {kind: scale_of(recorded, kind) for kind in ("grad", "value")}
        for name, theirs in recorded.items():
            if name == "output.pred" and name in found:
                share = (found[name].reshape(theirs.shape) != theirs).double().mean().item()
                rows.append(Row("output.pred (share of pixels)", share, share, "abs 1e-03", share <= 1e-3))
            elif name in found:
                tolerance = self.adapter.tolerance(name, dtype)
                rows.append(row(name, found[name], theirs, tolerance, relative=True, scale=scales[kind_of(name)]))
            elif name.startswith("grad.") and "output.loss" in recorded and not self.adapter.why_left_out(name):
                rows.append(Row(f"{name} (none here)", float("inf"), float("inf"), "a gradient", False))
        return rows

    def recheck(self, rows: list[Row], recorded: Mapping[str, Tensor]) -> list[Row]:
        """Judge float32 tensors beyond tolerance by our own float64 and by what float32 costs them."""

        def beyond(row: Row) -> bool:
            known = row.name in recorded and row.absolute < float("inf")  # NaN is not known
            return known and not row.passed and self.adapter.tolerance(row.name, torch.float32) > 0

        if not any(beyond(r) for r in rows):
            return rows
        names = {name: recorded[name] for name in (*(r.name for r in rows), "output.loss") if name in recorded}
        tolerances = {r.name: self.adapter.tolerance(r.name, torch.float32) for r in rows}
        truth, singles, judged = self.measure(torch.float64, names), [self.measure(torch.float32, names)], rows
        for seeds in NUDGES:
            singles += [self.measure(torch.float32, names, seed) for seed in seeds]
            own = Exact(truth, singles)
            judged = [own.judge(r, recorded[r.name], tolerances[r.name]) if beyond(r) else r for r in rows]
            left = [r for r in judged if beyond(r) and not r.passed]
            if not left or any(kind_of(r.name) == "value" for r in left):  # only gradients jump: more runs cannot help
                break
        return judged


def not_compared(
    adapter: Adapter, recorded: Mapping[str, Tensor], rows: Sequence[Row], renamed: Mapping[str, str]
) -> dict[str, str]:
    """Every recorded result that no row compares, with the reason."""
    compared = {r.name.split(" ")[0] for r in rows}
    reasons = {}
    for name in recorded:
        kind = name.split(".")[0]
        if name in compared or kind not in ("inter", "output", "grad", "train", "post", "f64", "extra", "unpadded"):
            continue
        if own := adapter.why_left_out(name.removeprefix("f64.")):
            reasons[name] = own
        elif kind in ("grad", "post", "train") and "output.loss" not in recorded:
            reasons[name] = "the case has no output.loss to run backward from"
        elif kind == "post":
            reasons[name] = f"our model has no buffer for it ({renamed.get(name[5:], 'not converted')})"
        else:
            reasons[name] = NO_RULE
    return reasons


def table(rows: list[Row]) -> str:
    width = max(len(r.name) for r in rows)
    lines = [f"{'tensor':{width}}  {'max abs':>9}  {'relative':>9}  {'tolerance':>10}  verdict"]
    lines += [
        f"{r.name:{width}}  {r.absolute:9.2e}  {r.relative:9.2e}  {r.tolerance:>10}  {'ok' if r.passed else 'BEYOND'}"
        + (f" ({r.reason})" if r.reason else "")
        for r in rows
    ]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="caris, detris, lavt, rela, ...")
    parser.add_argument("case", type=Path, help="a recorded .safetensors file")
    parser.add_argument("--config", type=Path, help="JSON with the sizes (default: the first recorded one that fits)")
    parser.add_argument("--weights", type=Path, help="official weights, when the case has none of its own")
    arguments = parser.parse_args()
    if not arguments.case.is_file():
        parser.error(f"{arguments.case} does not exist")
    adapter = load_adapter(arguments.model)
    recorded = read_tensors(arguments.case)
    check_case(arguments.model, arguments.case, recorded)
    weights = official_weights(recorded)
    if arguments.weights or not weights:
        beside = arguments.weights or find_tiny_weights(arguments.model, arguments.case)
        weights = official_weights(read_tensors(beside))
    if arguments.config:
        config = read_config(arguments.config)
    else:
        config = find_config(adapter, arguments.model, arguments.case, weights)
    try:
        rows = compare(adapter, config, recorded, weights)
        renamed = load_model(adapter, config, weights)[1]
    except Exception as error:  # a case of another kind: say so, instead of a traceback
        fail(f"{arguments.case} cannot be compared as a case of {arguments.model}: {type(error).__name__}: {error}")
    if not rows:
        fail(f"{arguments.case} has no tensor that the adapter of {arguments.model} compares")
    print(table(rows))
    beyond = [r.name for r in rows if not r.passed]
    left_out = not_compared(adapter, recorded, rows, renamed)
    print(f"{len(rows)} compared, {len(beyond)} beyond tolerance; {len(left_out)} recorded but not compared")
    print("\n".join(f"  {name}: {reason}" for name, reason in left_out.items()), end="\n" if left_out else "")
    return 1 if beyond else 0


def read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except Exception as error:  # safetensors' own kinds
        fail(f"{path} is not a readable .safetensors file: {error}")


def check_case(model: str, case: Path, recorded: Mapping[str, Tensor]) -> None:
    """End with a sentence if a file is not a case of a whole model."""
    if "input.ids" in recorded and "input.image" not in recorded:
        fail(f"{case} stores no image: full-size cases are generated and compared by tests/models/test_{model}.py")
    if "input.ids" not in recorded:
        kinds = ", ".join(sorted({name.split(".")[0] for name in recorded})[:8])
        fail(f"{case} has no input.image and input.ids, only {kinds}; a test of that component compares it")


def find_tiny_weights(model: str, case: Path) -> Path:
    """Weights for a case that has none: the tiny case of its folder, else the recorded one."""
    beside = case.parent / "tiny.safetensors"
    return beside if beside.is_file() and beside != case else find_beside(model, Path(model), ".safetensors")


if __name__ == "__main__":
    sys.exit(main())
