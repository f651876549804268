"""From a run's config to the built parts of a run. Every `build_*` here sees the config; what they build does not."""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from timm.layers import convert_sync_batchnorm
from torch import nn
from torch.utils.data import DataLoader

from amltrain.config.partial import override
from amltrain.config.schema import DataConfig, Preprocess, Protocol, RunConfig
from amltrain.data.dataset import ReferDataset
from amltrain.data.leakage import combined_path, write_combined_manifest
from amltrain.data.loaders import build_eval_loaders, build_tokenizer, build_train_dataset, leaks
from amltrain.data.prepare import describe, prepare, read_manifest
from amltrain.data.refer import refer_paths
from amltrain.data.shapes import SPLIT_SIZES, write_refshapes
from amltrain.data.specs import check_split
from amltrain.data.text import SentenceTokenizer
from amltrain.errors import UserError
from amltrain.evaluation.protocols import run_protocol
from amltrain.evaluation.results import Results, write_results
from amltrain.hub.model_folder import RESULTS_FILE, TRAINING_FILE, load_pretrained, load_weights, save_pretrained
from amltrain.losses import create_loss
from amltrain.methods.base import Method
from amltrain.methods.registry import build_method
from amltrain.models import ModelInfo, RISModel, create_model, model_info
from amltrain.training.provenance import describe_training, train_mask_parts


class Parts(NamedTuple):
    """The built parts of a run, before Accelerate wraps any of them. `preprocess` and `protocol` are complete."""

    method: Method
    dataset: ReferDataset
    eval_loaders: dict[str, DataLoader]
    tokenizer: SentenceTokenizer
    preprocess: Preprocess
    protocol: Protocol
    model_kwargs: dict[str, Any]


def ensure_prepared(data: DataConfig, say: Callable[[str], None]) -> None:
    """Prepare every data set that is not there yet: from `refer_root`, or drawn for the refshapes family."""
    prepared = Path(data.prepared)
    for name in data.datasets:
        check_split(name, data.train_split)
    if not prepared.exists() and data.prepared.count("/") == 1 and data.refer_root is None and not _synthetic(data):
        return  # a Hub data set
    missing = [name for name in data.datasets if read_manifest(prepared / name) is None]
    for name in missing:  # of every one, before the first takes its minutes
        _check_source(name, data)
    for name in missing:
        if "shapes" in name:
            source = _draw_scenes(name, data)
            manifest = prepare(name, source, prepared, max_skipped=data.max_skipped, drawn=asdict(data.shapes))
        else:
            manifest = prepare(
                name, data.refer_root, prepared, image_root=data.image_root, max_skipped=data.max_skipped
            )
        say(describe(manifest))


def _check_source(name: str, data: DataConfig) -> None:
    """Raise UserError if there is nothing that a data set could be prepared from."""
    if "shapes" in name:
        return
    if data.refer_root is None:
        raise UserError(
            f"{Path(data.prepared) / name} is not prepared; give data.refer_root (and data.image_root), or run "
            f"amltrain prepare --dataset {name}"
        )
    refer_paths(Path(data.refer_root), name)


def ensure_training_data(data: DataConfig, say: Callable[[str], None]) -> None:
    """Prepare what is missing, and write down what combined training drops."""
    ensure_prepared(data, say)
    if len(data.datasets) > 1:
        path = combined_path(data.prepared, data.datasets, data.leak_filter)
        say(write_combined_manifest(path, data.prepared, data.datasets, leaks(data)))


def _draw_scenes(name: str, data: DataConfig) -> Path:
    """Draw a data set of the refshapes family; returns its folder in the original layout."""
    scenes = data.shapes
    source = Path(data.prepared) / "source" / f"{name}-{scenes.size}px-seed{scenes.seed}"
    sizes = dict.fromkeys(SPLIT_SIZES, scenes.evaluation) | {"train": scenes.train}
    try:
        write_refshapes(source, name, split_sizes=sizes, size=scenes.size, seed=scenes.seed)
    except OSError as error:
        raise UserError(
            f"could not draw scenes into {source} ({error.strerror or error}); make room, or choose another "
            f"data.prepared"
        ) from error
    return source


def check_scenes(data: DataConfig) -> None:
    """Raise UserError if synthetic scenes were drawn otherwise than data.shapes asks for, by an earlier run."""
    for name in data.datasets:
        drawn = (read_manifest(Path(data.prepared) / name) or {}).get("drawn")
        if drawn is not None and drawn != asdict(data.shapes):
            raise UserError(
                f"{Path(data.prepared) / name} holds scenes drawn with {drawn}, data.shapes asks for "
                f"{asdict(data.shapes)}; remove the folder or choose another data.prepared"
            )


def _synthetic(data: DataConfig) -> bool:
    return any("shapes" in name for name in data.datasets)


def build_parts(config: RunConfig, *, processes: int, on_cuda: bool, resume_from: Path | None = None) -> Parts:
    """Build model, loss, method and data; the random start of the weights is a function of the seed.

    resume_from: the checkpoint that the run goes on from; its words keep their numbers.
    """
    check_scenes(config.data)
    info = model_info(config.model.name)
    preprocess = override(info.preprocess, config.preprocess)
    protocol = run_protocol(info.protocol, config.data, config.evaluation.protocol)
    tokenizer = choose_tokenizer(config, preprocess, resume_from)
    torch.manual_seed(config.seed)
    model, kwargs = build_model(config, tokenizer)
    loss = build_loss(config, info)
    method = build_method(config.method, model, loss, config.method_options, tokenizer.vocabulary)
    if config.train.sync_batchnorm and processes > 1 and on_cuda:
        # timm's, because torch's own would drop the activation inside timm's fused batch norms
        method = convert_sync_batchnorm(method)
    mask_parts = train_mask_parts(config)
    dataset = build_train_dataset(config.data, preprocess, tokenizer, mask_parts=mask_parts, seed=config.seed)
    loaders = build_eval_loaders(config.data, preprocess, config.evaluation, protocol, tokenizer, seed=config.seed)
    return Parts(method, dataset, loaders, tokenizer, preprocess, protocol, kwargs)


def choose_tokenizer(config: RunConfig, preprocess: Preprocess, resume_from: Path | None) -> SentenceTokenizer:
    """The one that the weights were trained with, where there are any; else the protocol's."""
    if resume_from is not None:
        return SentenceTokenizer.load(resume_from / "model")
    if config.model.checkpoint is not None and config.preprocess.tokenizer is None:
        trained_with = load_pretrained(config.model.checkpoint).tokenizer
        if trained_with is not None:
            return SentenceTokenizer(trained_with.tokenizer, preprocess.max_tokens or trained_with.max_tokens)
    return build_tokenizer(config.data, preprocess)


def build_model(config: RunConfig, tokenizer: SentenceTokenizer) -> tuple[RISModel, dict[str, Any]]:
    """The model, and the arguments that build it again without pretrained encoders."""
    wanted = config.model
    kwargs = {"vocab_size": tokenizer.vocab_size, **wanted.kwargs}
    start = {
        key: value
        for key, value in (("vision_weights", wanted.vision_weights), ("text_weights", wanted.text_weights))
        if value is not None
    }
    model = create_model(wanted.name, **kwargs, **start)
    if wanted.checkpoint is not None:
        load_weights(model, load_pretrained(wanted.checkpoint).model.state_dict(), wanted.checkpoint)
    if wanted.gradient_checkpointing:
        model.set_gradient_checkpointing(True)
    return model, kwargs


def build_loss(config: RunConfig, info: ModelInfo) -> nn.Module:
    name = config.loss.name or info.loss
    defaults = info.loss_kwargs if name == info.loss else {}
    return create_loss(name, **{**defaults, **config.loss.kwargs})


def write_model_folder(
    folder: Path, config: RunConfig, parts: Parts, state_dict: dict[str, Any], results: Sequence[Results] = ()
) -> None:
    """The model of a run as a folder that loads alone; with how it was trained and, if it was evaluated, its scores."""
    save_pretrained(
        folder,
        name=config.model.name,
        kwargs=parts.model_kwargs,
        state_dict=state_dict,
        preprocess=parts.preprocess,
        protocol=parts.protocol,
        tokenizer=parts.tokenizer,
    )
    (folder / TRAINING_FILE).write_text(json.dumps(describe_training(config), indent=2) + "\n", encoding="utf-8")
    if results:
        write_results(folder / RESULTS_FILE, results)
