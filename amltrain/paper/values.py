"""Read the values of a table from what its commands wrote.

The distortion bound behind the random projections (Johnson & Lindenstrauss; the AML paper's theorem).

The theorem: a Gaussian map to D dimensions, entries N(0, 1/D), keeps all squared distances between n points within a
factor 1 +- epsilon. It holds inside one modality, and for concatenated pairs (v, t) under the block-diagonal map of the
two matrices. It does not cover inner products `<Wi v, Wt t>` across modalities: with independent matrices those
have mean 0 and variance `|v|^2 |t|^2 / D`, whatever v and t are.
"""

import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from amltrain.evaluation.results import Results, read_results
from amltrain.evaluation.tables import describe
from amltrain.paper.plan import (
    TINY_SIZE,
    Kind,
    Row,
    Settings,
    Table,
    analysed,
    cost_files,
    read_json,
    read_recipe,
    run_folder,
    shared_folder,
    shown_split,
)
from amltrain.run_folder import RESULTS_FILE, read_log

PAPER_DIM = 2048
PAPER_JL = 89.4
"""epsilon^2 D of the three JL errors that the paper prints."""
PATCH = 32


class Value(NamedTuple):
    """A measured value, and how it was measured."""

    value: float
    protocol: str


def row_values(table: Table, row: Row, seed: int, settings: Settings) -> dict[str, Value]:
    """The values of a row that are there, by measure."""
    found: dict[str, Value] = {}
    for measure in row.cells:
        value = READERS[row.kind](table, row, measure, seed, settings)
        if value is not None:
            found[measure] = value
    return found


def _scores(table: Table, row: Row, measure: str, seed: int, settings: Settings) -> Value | None:
    split, metric = measure.split("/")
    folder = run_folder(row.run, seed, settings) / "reproduce"
    for result in _results(folder / RESULTS_FILE):
        if f"{result.dataset}:{result.split}" == shown_split(split, settings) and result.is_score:
            return Value(result.score(metric), _scored(result))
    return None


def _log(table: Table, row: Row, measure: str, seed: int, settings: Settings) -> Value | None:
    name, epoch = _epoch(measure)
    records = {line["step"]: line[name] for line in read_log(run_folder(row.run, seed, settings)) if name in line}
    what = "mean over the epoch's steps" if name == "epoch_loss" else "evaluated during training"
    return _at(records, epoch, row, what)


def _over_checkpoints(file: str, what: str) -> Callable[..., Value | None]:
    """A reader of an analysis over checkpoints, whose JSON file holds values by step."""

    def read(table: Table, row: Row, measure: str, seed: int, settings: Settings) -> Value | None:
        name, epoch = _epoch(measure)
        steps: Mapping[str, Any] = read_json(run_folder(row.run, seed, settings) / file).get("steps", {})
        return _at({int(step): values[name] for step, values in steps.items()}, epoch, row, what)

    return read


def _robustness(table: Table, row: Row, measure: str, seed: int, settings: Settings) -> Value | None:
    place, name = measure.split(", ")
    split, metric = place.split("/")
    rows = [r for r in _analysis_rows(table, row, split, seed, settings) if r.provenance["perturbation"]]
    if name != "mean":
        rows = [r for r in rows if r.provenance["perturbation"]["name"] == name.replace(" ", "_")]
    if not rows:
        return None
    what = f"mean of {len(rows)} perturbations" if name == "mean" else name
    return Value(fmean(r.score(metric) for r in rows), f"{what}, {_scored(rows[0])}")


def _occlusion(table: Table, row: Row, measure: str, seed: int, settings: Settings) -> Value | None:
    place, condition = measure.split(", ")
    split, metric = place.split("/")
    share = float(condition.removeprefix("drop at ").removesuffix(" %")) / 100
    scores = {}
    for result in _analysis_rows(table, row, split, seed, settings):
        changed = result.provenance["perturbation"]
        scores[changed["severity"] if changed else 0.0] = result
    if share not in scores:
        return None
    value = scores[share].score(metric)
    if condition.startswith("drop"):
        value = scores[0.0].score(metric) - value
    return Value(value, f"grey 32 px blocks, {_scored(scores[share])}")


def _activation(table: Table, row: Row, measure: str, seed: int, settings: Settings) -> Value | None:
    samples = read_json(shared_folder("activation", table, seed, settings) / "activation.json").get("samples", [])
    values = [s[measure.replace(" ", "_")] for s in samples if s["model"] == _name(row)]
    return Value(100 * fmean(values), f"mean of {len(values)} samples") if values else None


def _histogram(table: Table, row: Row, measure: str, seed: int, settings: Settings) -> Value | None:
    file = read_json(shared_folder("histogram", table, seed, settings) / "histogram.json")
    values = file.get("models", {}).get(_name(row))
    return Value(values[measure], f"{file['pairs']} pairs of val, temperature of each model") if values else None


def _cost(table: Table, row: Row, measure: str, seed: int, settings: Settings) -> Value | None:
    timed, counted = cost_files(row, settings)
    file = read_json(counted if measure == "FLOPs" else timed)
    if not file:
        return None
    value = file["steps"]["paper"][{"time": "ratio", "memory": "memory_ratio", "FLOPs": "ratio"}[measure]]
    how = "counted, one sample" if measure == "FLOPs" else f"batch {file['batch']}, {file['hardware']}"
    return None if value is None else Value(value, f"{file['model']}, {file['size']} px, {how}")


def _bound(table: Table, row: Row, measure: str, seed: int, settings: Settings) -> Value | None:
    """A function of the recipe alone."""
    from amltrain.models import model_info  # torch takes seconds

    recipe = read_recipe(row.run.recipe)
    preprocess = model_info(recipe.tiny_model if settings.scale == "tiny" else recipe.model).preprocess
    size = TINY_SIZE if settings.scale == "tiny" else preprocess.size
    points = (size // PATCH) ** 2 + preprocess.max_tokens
    dim = int(recipe.options.get("dim", PAPER_DIM))
    if measure != "distortion bound":
        return Value(math.sqrt(PAPER_JL / dim), f"sqrt({PAPER_JL} / {dim})")
    return Value(distortion_bound(points, dim), f"computed for {points} patches and tokens")


READERS: dict[Kind, Callable[[Table, Row, str, int, Settings], Value | None]] = {
    "scores": _scores,
    "log": _log,
    "losses": _over_checkpoints("losses/losses.json", "fixed training pairs, images without masks, evaluation mode"),
    "alignment": _over_checkpoints("dynamics/dynamics.json", "fixed pairs of val, temperature of the untrained model"),
    "robustness": _robustness,
    "occlusion": _occlusion,
    "activation": _activation,
    "histogram": _histogram,
    "cost": _cost,
    "bound": _bound,
    "published": lambda *_: None,
}


def _epoch(measure: str) -> tuple[str, float]:
    """("score_mean", 10) of "score_mean, epoch 10"."""
    name, epoch = re.fullmatch(r"(.*), epoch ([\d.]+)", measure).groups()  # type: ignore[union-attr]
    return name, float(epoch)


def _at(records: Mapping[int, float], epoch: float, row: Row, what: str) -> Value | None:
    """The record nearest to the end of an epoch of the run, by the share of the run's steps."""
    if not records:
        return None
    recipe = read_recipe(row.run.recipe)
    wanted = max(records) * epoch / (row.run.stop_after or recipe.epochs)
    step = min(records, key=lambda known: abs(known - wanted))
    return Value(records[step], f"{what}, step {step:,} of {max(records):,}")


def _name(row: Row) -> str:
    return analysed(row, Path()).partition("=")[0]


def _analysis_rows(table: Table, row: Row, split: str, seed: int, settings: Settings) -> list[Results]:
    """Rows of a shared analysis of one model and split."""
    place = str(run_folder(row.run, seed, settings))
    rows = _results(shared_folder(row.kind, table, seed, settings) / RESULTS_FILE)
    wanted = shown_split(split, settings)
    return [r for r in rows if f"{r.dataset}:{r.split}" == wanted and r.provenance.get("checkpoint") == place]


def _scored(result: Results) -> str:
    return f"{result.dataset} {result.split}, {result.counts['samples']:,} samples, {describe(result)}"


def _results(path: Path) -> list[Results]:
    return read_results(path) if path.is_file() else []


def failure_probability(points: int, dim: int, epsilon: float) -> float:
    """Bound on the probability that any of the n (n - 1) / 2 squared distances leaves 1 +- epsilon; at most 1.

    Chi-square tails (Dasgupta & Gupta, 2003): `2 exp(-D / 4 (epsilon^2 - 2/3 epsilon^3))` for each pair, then a sum.
    epsilon in (0, 1).
    """
    pairs = points * (points - 1) / 2
    return min(1.0, pairs * 2 * math.exp(-dim / 4 * (epsilon**2 - 2 / 3 * epsilon**3)))


def distortion_bound(points: int, dim: int, probability: float = 0.95) -> float:
    """Smallest epsilon in (0, 1) that all squared distances between n points keep to with at least this probability.

    1.0 when the dimension is too small for any.
    """
    low, high = 0.0, 1.0
    if failure_probability(points, dim, high) > 1 - probability:
        return 1.0
    for _ in range(60):
        middle = (low + high) / 2
        if failure_probability(points, dim, middle) > 1 - probability:
            low = middle
        else:
            high = middle
    return high
