"""From models and scorers to a table, a CSV and pictures: what `amltrain analyse diagnose` does."""

import argparse
import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from accelerate import Accelerator
from numpy.typing import NDArray

from amltrain.config.schema import DataConfig, ProtocolOverrides
from amltrain.data.transforms import prepare_batch
from amltrain.errors import UserError, unknown_name
from amltrain.evaluation.results import run_protocol, write_text
from amltrain.evaluation.tables import csv_text
from amltrain.methods.aml.scorers import GroundedScorer
from amltrain.paper.alignment import (
    CANDIDATES,
    candidate_masker,
    collect_scores,
    draw_dynamics,
    draw_histogram,
    fit_grounded,
    fits_model,
    has_temperature,
    score_histogram,
    score_statistics,
    statistics_table,
)
from amltrain.paper.analyse_alignment import run_checkpoints
from amltrain.paper.analysed import Analysed, data_of, load_models, loaders_of, moved, parse_models, single_process

SHOWN = (
    "score_mean",
    "score_std",
    "below_0.4",
    "referent_below_0.4",
    "masked_image",
    "referent_ratio",
    "auc",
    "auc_shuffled",
    "agreement",
)
"""Columns of the table; the CSV has all."""


class Diagnosis(NamedTuple):
    """Statistics of one scorer on one model, its histogram [BINS], and its temperature (None = it has none)."""

    scorer: str
    model: str
    statistics: dict[str, float]
    histogram: NDArray[np.float64]
    temperature: float | None


def diagnose(args: argparse.Namespace) -> str:
    """Score the models' samples with every scorer; write OUTPUT/diagnose.md, .csv and pictures; return the table."""
    scorers = list(CANDIDATES) if args.scorers == ["all"] else args.scorers
    for name in scorers:
        if name not in CANDIDATES:
            raise unknown_name("--scorers", name, CANDIDATES)
    places = _places(args)
    data = data_of(args, next(iter(places.values())))
    accelerator = single_process(data)
    found: list[Diagnosis] = []
    left_out: dict[str, str] = {}
    temperatures: dict[str, float] = {}
    for name, place in places.items():
        [model] = load_models([f"{name}={place}"])
        found += _diagnose_model(args, accelerator, data, model, scorers, temperatures, left_out)
    if not found:
        raise UserError(f"the model can have none of these scores: {'; '.join(left_out.values())}")
    text = _table(found, temperatures, left_out)
    write_text(args.output / "diagnose.md", text + "\n")
    write_text(args.output / "diagnose.csv", _csv(found))
    _draw(args, found)
    return text


def _places(args: argparse.Namespace) -> dict[str, str]:
    places = parse_models(args.models)
    if not args.checkpoints:
        return places
    if len(places) > 1:
        raise UserError("--checkpoints follows one run; give --models one run folder")
    return {f"step {step:,}": str(folder) for step, folder in run_checkpoints(Path(next(iter(places.values()))))}


def _diagnose_model(
    args: argparse.Namespace,
    accelerator: Accelerator,
    data: DataConfig,
    model: Analysed,
    scorers: list[str],
    temperatures: dict[str, float],
    left_out: dict[str, str],
) -> list[Diagnosis]:
    """Every scorer on one model. temperatures: by scorer, filled by the first model; left_out: why, by scorer."""
    network = moved(accelerator, model)
    batches = _batches(args, accelerator, data, model, args.split, args.batches)
    found = []
    for name in scorers:
        if reason := fits_model(network, name):
            left_out[name] = f"{name}: {reason}"
            continue
        masker = candidate_masker(
            network, name, batches[: args.calibration], temperature=temperatures.get(name), seed=args.seed
        )
        if isinstance(masker.scorer, GroundedScorer):
            fit_grounded(network, masker.scorer, _batches(args, accelerator, data, model, "train", args.fit_batches))
        temperature = float(masker.scorer.temperature) if has_temperature(masker.scorer) else None  # type: ignore[arg-type]
        if temperature is not None:
            temperatures[name] = temperature
        collected = collect_scores(network, masker, batches)
        statistics = score_statistics(collected, masker.block)
        found.append(Diagnosis(name, model.name, statistics, score_histogram(collected), temperature))
    return found


def _batches(
    args: argparse.Namespace, accelerator: Accelerator, data: DataConfig, model: Analysed, split: str, count: int
) -> list[Any]:
    """The first batches of a split of all data sets, on the device."""
    protocol = run_protocol(model.pretrained.protocol, data, ProtocolOverrides())
    loaders = loaders_of(argparse.Namespace(**{**vars(args), "split": split}), data, model, protocol)
    normalization = model.pretrained.preprocess.normalization
    batches = itertools.islice(itertools.chain.from_iterable(loaders.values()), count)
    return [prepare_batch(batch, normalization, accelerator.device) for batch in batches]


def _table(found: list[Diagnosis], temperatures: Mapping[str, float], left_out: Mapping[str, str]) -> str:
    rows = {f"{d.scorer}, {d.model}": {name: d.statistics[name] for name in SHOWN} for d in found}
    lines = [statistics_table(rows, "score, model"), ""]
    if temperatures:
        named = ", ".join(f"{name} {value:.4g}" for name, value in temperatures.items())
        lines.append(f"Temperatures, solved on {found[0].model} and used for all: {named}.")
    return "\n".join([*lines, *left_out.values()]).rstrip()


def _csv(found: list[Diagnosis]) -> str:
    rows: list[list[object]] = [["scorer", "model", "temperature", *found[0].statistics]]
    for d in found:
        temperature = "" if d.temperature is None else f"{d.temperature:.6g}"
        rows.append([d.scorer, d.model, temperature, *(f"{value:.6g}" for value in d.statistics.values())])
    return csv_text(rows)


def _draw(args: argparse.Namespace, found: list[Diagnosis]) -> None:
    """A histogram for every scorer, and its curves where the models are checkpoints."""
    for name in dict.fromkeys(d.scorer for d in found):
        own = [d for d in found if d.scorer == name]
        draw_histogram({d.model: d.histogram for d in own}, args.output / f"histogram_{name}.png")
        if args.checkpoints:
            steps = [int(d.model.removeprefix("step ").replace(",", "")) for d in own]
            draw_dynamics(steps, [d.statistics for d in own], args.output / f"dynamics_{name}.png")
