"""Mean loss of runs on whole images over their checkpoints: from the command line to a table and a picture."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from amltrain.commands.analyse_alignment import run_checkpoints
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
from amltrain.config.schema import LossConfig, ProtocolOverrides, RunConfig
from amltrain.evaluation.analysis.convergence import draw_losses, losses_table
from amltrain.evaluation.protocols import run_protocol
from amltrain.evaluation.results import write_text
from amltrain.hub.find import find_model_folder
from amltrain.hub.model_folder import read_training
from amltrain.models import model_info
from amltrain.records import Batch
from amltrain.training.build import build_loss


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
