"""Histogram and dynamics of AML's alignment scores: from the command line to a table and a picture.

Mean loss of runs on whole images over their checkpoints: from the command line to a table and a picture.
"""

import argparse
import itertools
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from amltrain.config.schema import DataConfig, LossConfig, ProtocolOverrides, RunConfig
from amltrain.data.transforms import prepare_batch
from amltrain.errors import UserError
from amltrain.evaluation.results import run_protocol, write_text
from amltrain.hub.model_folder import read_training
from amltrain.models import model_info
from amltrain.paper.alignment import (
    candidate_masker,
    collect_scores,
    draw_dynamics,
    draw_histogram,
    histogram_table,
    score_histogram,
    score_statistics,
    statistics_table,
)
from amltrain.paper.analysed import (
    Analysed,
    data_of,
    fixed_pairs,
    load_models,
    loaders_of,
    moved,
    parse_models,
    single_process,
)
from amltrain.paper.grids import draw_losses, losses_table
from amltrain.records import Batch
from amltrain.run_folder import MODEL, find_model_folder
from amltrain.training.build import build_loss

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
        if number and (folder / MODEL).is_dir():
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
    return [prepare_batch(batch, normalization, accelerator.device) for batch in batches]


def _write_json(args: argparse.Namespace, name: str, values: dict[str, Any]) -> None:
    write_text(args.output / f"{name}.json", json.dumps(values, indent=2) + "\n")


def losses(args: argparse.Namespace) -> str:
    """Mean loss of every checkpoint of the runs, on the same pairs, without masks and in evaluation mode.

    The losses that a run logs are those that it trains on: with AML, of masked images. These compare runs.
    """
    runs = {name: run_checkpoints(Path(place)) for name, place in parse_models(args.models).items()}
    data = data_of(args, str(next(iter(runs.values()))[0][1]))
    accelerator = single_process(data)
    found: dict[str, dict[int, float]] = {}
    count = 0
    for name, checkpoints in runs.items():
        loss, batches = nn.Module(), list[Batch]()
        for step, folder in checkpoints:
            [model] = load_models([f"model={folder}"])
            if not batches:
                loss = _loss(model).to(accelerator.device)
                protocol = run_protocol(model.pretrained.protocol, data, ProtocolOverrides())
                loader = next(iter(loaders_of(args, data, model, protocol).values()))
                batches = fixed_pairs(loader.dataset, args.pairs, args.batch_size, accelerator.device)
                count = sum(len(batch.image) for batch in batches)
            found.setdefault(name, {})[step] = mean_loss(moved(accelerator, model), loss, batches)
    text = losses_table(found) + f"\n\nMean over {count} pairs of {args.split}, whole images, evaluation mode."
    models = {name: {str(step): {"loss": value} for step, value in values.items()} for name, values in found.items()}
    steps = next(iter(models.values())) if len(models) == 1 else {}
    write_text(args.output / "losses.json", json.dumps({"models": models, "steps": steps, "pairs": count}, indent=2))
    write_text(args.output / "losses.md", text + "\n")
    draw_losses(found, args.output / f"losses.{args.format}")
    return text


def mean_loss(model: nn.Module, loss: nn.Module, batches: Sequence[Batch]) -> float:
    """Mean over the samples of the batches; the model must be in evaluation mode."""
    with torch.no_grad():
        values = [(float(loss(model(batch), batch)["loss"]), len(batch.image)) for batch in batches]
    return sum(value * size for value, size in values) / sum(size for _, size in values)


def _loss(model: Analysed) -> nn.Module:
    """The loss that a model was trained with."""
    training = read_training(find_model_folder(model.place))
    chosen = LossConfig(**training["recipe"]["loss"]) if training else LossConfig()
    return build_loss(RunConfig(loss=chosen), model_info(model.pretrained.name))
