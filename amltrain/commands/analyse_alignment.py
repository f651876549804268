"""Histogram and dynamics of AML's alignment scores: from the command line to a table and a picture."""

import argparse
import itertools
import json
import re
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import send_to_device

from amltrain.commands.analysed import (
    Analysed,
    data_of,
    fixed_pairs,
    load_models,
    loaders_of,
    moved,
    parse_models,
    single_process,
)
from amltrain.config.schema import DataConfig, ProtocolOverrides
from amltrain.data.transforms import normalise_batch
from amltrain.errors import UserError
from amltrain.evaluation.analysis.alignment import draw_dynamics, draw_histogram, histogram_table, statistics_table
from amltrain.evaluation.protocols import run_protocol
from amltrain.evaluation.results import write_text
from amltrain.methods.aml.scores import candidate_masker, collect_scores, score_histogram, score_statistics

NOTE = "Scores of the paper's PMME on early features; temperature solved on the first batches of {}."


def histogram(args: argparse.Namespace) -> str:
    """Distribution of the scores under every model, each at a temperature solved for that model."""
    models = load_models(args.models)
    data = data_of(args, models[0].place)
    accelerator = single_process(data)
    shares, statistics = {}, {}
    for model in models:
        batches = _batches(args, accelerator, data, model)
        network = moved(accelerator, model)
        masker = candidate_masker(network, "paper", batches[: args.calibration])
        collected = collect_scores(network, masker, batches)
        shares[model.name], statistics[model.name] = score_histogram(collected), score_statistics(collected)
    text = histogram_table(shares, statistics) + "\n\n" + NOTE.format("each model")
    _write_json(args, "histogram", {"models": statistics, "pairs": sum(len(b.image) for b in batches)})
    write_text(args.output / "histogram.md", text + "\n")
    draw_histogram(shares, args.output / f"histogram.{args.format}")
    return text


def dynamics(args: argparse.Namespace) -> str:
    """Statistics of the scores at every checkpoint of a run, at one temperature."""
    places = list(parse_models(args.models).values())
    if len(places) > 1:
        raise UserError("dynamics follows one run; give --models one run folder")
    checkpoints = run_checkpoints(Path(places[0]))
    data = data_of(args, str(checkpoints[0][1]))
    accelerator = single_process(data)
    masker, statistics = None, {}
    for step, folder in checkpoints:
        [model] = load_models([f"model={folder}"])
        batches = _batches(args, accelerator, data, model)
        network = moved(accelerator, model)
        masker = masker or candidate_masker(network, "paper", batches[: args.calibration])
        statistics[step] = score_statistics(collect_scores(network, masker, batches))
    rows = {f"{step:,}": values for step, values in statistics.items()}
    text = statistics_table(rows, "step") + "\n\n" + NOTE.format(f"step {checkpoints[0][0]:,}")
    _write_json(args, "dynamics", {"steps": statistics, "pairs": sum(len(b.image) for b in batches)})
    write_text(args.output / "dynamics.md", text + "\n")
    draw_dynamics(list(statistics), list(statistics.values()), args.output / f"dynamics.{args.format}")
    return text


def run_checkpoints(run: Path) -> list[tuple[int, Path]]:
    """Steps and folders of the checkpoints that a run still has, in order. Raises UserError for fewer than two."""
    found = []
    for folder in run.glob("step-*"):
        number = re.fullmatch(r"step-(\d+)", folder.name)
        if number and (folder / "model").is_dir():
            found.append((int(number[1]), folder))
    if len(found) < 2:
        kept = ", ".join(folder.name for _, folder in found) or "none"
        raise UserError(
            f"{run} keeps too few checkpoints for dynamics ({kept}), which needs two; train with a larger "
            "checkpoint.keep and a smaller checkpoint.every_steps"
        )
    return sorted(found)


def _batches(args: argparse.Namespace, accelerator: Accelerator, data: DataConfig, model: Analysed) -> list[Any]:
    """The first batches of the first data set, on the device."""
    protocol = run_protocol(model.pretrained.protocol, data, ProtocolOverrides())
    loader = next(iter(loaders_of(args, data, model, protocol).values()))
    if args.pairs:
        return fixed_pairs(loader.dataset, args.pairs, args.batch_size, accelerator.device)
    normalization = model.pretrained.preprocess.normalization
    batches = itertools.islice(loader, args.batches)
    return [normalise_batch(send_to_device(batch, accelerator.device), normalization) for batch in batches]


def _write_json(args: argparse.Namespace, name: str, values: dict[str, Any]) -> None:
    write_text(args.output / f"{name}.json", json.dumps(values, indent=2) + "\n")
