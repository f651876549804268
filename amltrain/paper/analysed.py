"""What a model was trained on: the defaults of the commands that run it on data.

Shared code of the model analyses: the models of the command line, and the data to run them on.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from PIL import Image
from torch.utils.data import DataLoader

from amltrain.config.schema import DataConfig, EvaluationConfig, Protocol, ShapesConfig
from amltrain.data.loaders import build_eval_loaders, collate, resolve_splits
from amltrain.data.prepare import ensure_prepared
from amltrain.data.text import SentenceTokenizer
from amltrain.data.transforms import prepare_batch
from amltrain.errors import UserError
from amltrain.hub.model_folder import Pretrained, load_pretrained
from amltrain.inference.evaluate import trained_data
from amltrain.records import Batch


class Analysed(NamedTuple):
    """A model to analyse. place: as the user named it."""

    name: str
    place: str
    pretrained: Pretrained
    tokenizer: SentenceTokenizer


def parse_seeds(models: Sequence[str]) -> dict[str, list[str]]:
    """NAME=PLACE,PLACE or PLACE -> name and places of its seeds. Raises UserError for a name or place given twice."""
    named: dict[str, list[str]] = {}
    for text in models:
        name, equals, places = text.partition("=")
        if not equals:
            places, name = text, Path(text.split(",")[0].rstrip("/")).name
        if not name or name in named:
            raise UserError(f"--models {text}: the name {name!r} is missing or taken; write NAME=PLACE")
        named[name] = places.split(",")
        if "" in named[name] or len(set(named[name])) < len(named[name]):
            raise UserError(f"--models {text}: a place is missing or given twice; write NAME=SEED1,SEED2,SEED3")
    return named


def parse_models(models: Sequence[str]) -> dict[str, str]:
    """NAME=PLACE or PLACE -> name and place. Raises UserError for a name given twice, or several places."""
    named = parse_seeds(models)
    for name, places in named.items():
        if len(places) > 1:
            raise UserError(f"--models {name}={','.join(places)}: this analysis takes one place of each model")
    return {name: places[0] for name, places in named.items()}


def load_models(models: Sequence[str]) -> list[Analysed]:
    """Load every model. Raises UserError for one without a tokenizer."""
    return [load_model(name, place) for name, place in parse_models(models).items()]


def load_model(name: str, place: str) -> Analysed:
    """Load one model. Raises UserError if it has no tokenizer."""
    pretrained = load_pretrained(place)
    if pretrained.tokenizer is None:
        raise UserError(f"{place} has no tokenizer files; save or convert it again with a tokenizer")
    return Analysed(name, place, pretrained, pretrained.tokenizer)


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
) -> dict[str, DataLoader[Any]]:
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
    return [prepare_batch(batch, normalization, device) for batch in collated]


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
