"""Shared code of the model analyses: the models of the command line, and the data to run them on."""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device
from PIL import Image
from torch.utils.data import DataLoader

from amltrain.commands.trained import trained_data
from amltrain.config.schema import DataConfig, EvaluationConfig, Protocol, ShapesConfig
from amltrain.data.collate import collate
from amltrain.data.ensure import ensure_prepared
from amltrain.data.loaders import build_eval_loaders, resolve_splits
from amltrain.data.text import SentenceTokenizer
from amltrain.data.transforms import normalise_batch
from amltrain.errors import UserError
from amltrain.hub.model_folder import Pretrained, load_pretrained
from amltrain.records import Batch


class Analysed(NamedTuple):
    """A model to analyse. place: as the user named it."""

    name: str
    place: str
    pretrained: Pretrained
    tokenizer: SentenceTokenizer


def parse_models(models: Sequence[str]) -> dict[str, str]:
    """NAME=PLACE or PLACE -> name and place. Raises UserError for a name given twice."""
    named: dict[str, str] = {}
    for text in models:
        name, equals, place = text.partition("=")
        if not equals:
            place, name = text, Path(text.rstrip("/")).name
        if not name or not place or name in named:
            raise UserError(f"--models {text}: the name {name!r} is missing or taken; write NAME=PLACE")
        named[name] = place
    return named


def load_models(models: Sequence[str]) -> list[Analysed]:
    """Load every model. Raises UserError for one without a tokenizer."""
    found = []
    for name, place in parse_models(models).items():
        pretrained = load_pretrained(place)
        if pretrained.tokenizer is None:
            raise UserError(f"{place} has no tokenizer files; save or convert it again with a tokenizer")
        found.append(Analysed(name, place, pretrained, pretrained.tokenizer))
    return found


def data_of(args: argparse.Namespace, place: str) -> DataConfig:
    """The data that --datasets and --prepared name; by default those that the model was trained on."""
    trained = trained_data(place)
    datasets = args.datasets or trained.get("datasets")
    if not datasets:
        raise UserError(f"{place} does not record its training data; give --datasets")
    prepared = args.prepared or trained.get("prepared", "prepared")
    shapes = ShapesConfig(**trained["shapes"]) if trained.get("shapes") else ShapesConfig()
    data = DataConfig(datasets=list(datasets), prepared=prepared, workers=args.workers, shapes=shapes)
    resolve_splits([args.split], data.datasets, data.prepared)
    return data


def loaders_of(
    args: argparse.Namespace,
    data: DataConfig,
    model: Analysed,
    protocol: Protocol,
    perturb: Callable[[Image.Image, int], Image.Image] | None = None,
) -> dict[str, DataLoader]:
    """A loader of the split for every data set, with the model's own preprocessing."""
    evaluation = EvaluationConfig(splits=[args.split], batch_size=args.batch_size, max_samples=args.max_samples)
    preprocess = model.pretrained.preprocess
    return build_eval_loaders(data, preprocess, evaluation, protocol, model.tokenizer, seed=args.seed, perturb=perturb)


def fixed_pairs(dataset: Any, count: int, batch_size: int, device: torch.device) -> list[Batch]:
    """Batches of `count` pairs spread over a split: the same pairs for every model, batch size and seed.

    Images are as the model takes them (normalised), on the device.
    """
    count = min(count, len(dataset))
    places = [i * len(dataset) // count for i in range(count)]
    normalization = dataset.describe()["normalization"]
    collated = (collate([dataset[i] for i in places[s : s + batch_size]]) for s in range(0, count, batch_size))
    return [normalise_batch(send_to_device(batch, device), normalization) for batch in collated]


def single_process(data: DataConfig) -> Accelerator:
    """An accelerator for one process, with the data prepared. Raises UserError under a launcher of several."""
    accelerator = Accelerator()
    if accelerator.num_processes > 1:
        raise UserError("amltrain analyse runs in one process; start it without accelerate launch")
    ensure_prepared(data, lambda text: print(text, file=sys.stderr))
    return accelerator


def moved(accelerator: Accelerator, model: Analysed) -> Any:
    """The model on the accelerator's device, in eval mode."""
    return model.pretrained.model.to(accelerator.device).eval()
