"""Build the components of a run from its config. Only `build_*` functions see the config."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from timm.layers import convert_sync_batchnorm
from torch import nn
from torch.utils.data import DataLoader

from amltrain.checkpoints.provenance import describe_training, train_mask_parts
from amltrain.config.fields import override
from amltrain.config.schema import Preprocess, Protocol, RunConfig
from amltrain.data.augment import build_augmentations
from amltrain.data.dataset import ReferDataset
from amltrain.data.loaders import build_eval_loaders, build_tokenizer, build_train_dataset
from amltrain.data.prepare import check_scenes
from amltrain.data.text import SentenceTokenizer
from amltrain.errors import UserError
from amltrain.evaluation.results import run_protocol
from amltrain.files import write_text
from amltrain.hub.model_folder import load_pretrained, load_weights, save_pretrained
from amltrain.losses import create_loss
from amltrain.methods.base import Method, build_method
from amltrain.models import ModelInfo, RISModel, create_model, model_info
from amltrain.records import Vocabulary
from amltrain.run_folder import MODEL, TRAINING_FILE


class RunComponents(NamedTuple):
    """What a run is made of, before Accelerate wraps any of it."""

    method: Method
    dataset: ReferDataset
    eval_loaders: dict[str, DataLoader]
    tokenizer: SentenceTokenizer
    preprocess: Preprocess
    protocol: Protocol
    model_kwargs: dict[str, Any]


MethodBuilder = Callable[[RISModel, nn.Module, Any, Vocabulary], Method]
"""What `register_method` registers: (model, loss, options, vocabulary) -> method."""


def build_components(
    config: RunConfig,
    *,
    processes: int,
    on_cuda: bool,
    resume_from: Path | None = None,
    model: RISModel | None = None,
    method: MethodBuilder | None = None,
) -> RunComponents:
    """Build model, loss, method and data; the random start of the weights is a function of the seed.

    resume_from: the checkpoint to resume from; its tokenizer is used. model, method: used instead of building those
    that the config names.
    """
    check_scenes(config.data)
    info = model_info(config.model.name)
    preprocess = override(info.preprocess, config.preprocess)
    protocol = run_protocol(info.protocol, config.data, config.evaluation.protocol)
    tokenizer = choose_tokenizer(config, preprocess, resume_from)
    torch.manual_seed(config.seed)
    given, kwargs = build_model(config, tokenizer) if model is None else (model, config.model.kwargs)
    loss = build_loss(config, info)
    if method is None:
        built = build_method(config.method, given, loss, config.method_options, tokenizer.vocabulary)
    else:
        built = method(given, loss, config.method_options, tokenizer.vocabulary)
        built.name = config.method
    if config.train.sync_batchnorm and processes > 1 and on_cuda:
        # timm's, because torch's own would drop the activation inside timm's fused batch norms
        built = convert_sync_batchnorm(built)
    mask_parts = train_mask_parts(config)
    dataset = build_train_dataset(
        config.data,
        preprocess,
        tokenizer,
        mask_parts=mask_parts,
        seed=config.seed,
        augmentations=build_augmentations(config.data.augment, config.augment_options),
        max_samples=config.train.limit_samples,
    )
    loaders = build_eval_loaders(config.data, preprocess, config.evaluation, protocol, tokenizer, seed=config.seed)
    return RunComponents(built, dataset, loaders, tokenizer, preprocess, protocol, kwargs)


def choose_tokenizer(config: RunConfig, preprocess: Preprocess, resume_from: Path | None) -> SentenceTokenizer:
    """Take the tokenizer that the weights were trained with, or else the model's own."""
    if resume_from is not None:
        return SentenceTokenizer.load(resume_from / MODEL)
    if config.model.checkpoint is not None and config.preprocess.tokenizer is None:
        trained_with = load_pretrained(config.model.checkpoint).tokenizer
        if trained_with is not None:
            return SentenceTokenizer(trained_with.tokenizer, preprocess.max_tokens or trained_with.max_tokens)
    return build_tokenizer(config.data, preprocess)


def build_model(config: RunConfig, tokenizer: SentenceTokenizer) -> tuple[RISModel, dict[str, Any]]:
    """Build the model; also the arguments that build it again without pretrained encoders."""
    wanted = config.model
    kwargs = {"vocab_size": tokenizer.vocab_size, **wanted.kwargs}
    start = {
        key: value
        for key, value in (("vision_weights", wanted.vision_weights), ("text_weights", wanted.text_weights))
        if value is not None
    }
    model = create_model(wanted.name, **kwargs, **start)
    check_vocabulary(model, tokenizer, pretrained=wanted.text_weights)
    if wanted.checkpoint is not None:
        load_weights(model, load_pretrained(wanted.checkpoint).model.state_dict(), wanted.checkpoint)
    if wanted.gradient_checkpointing:
        model.set_gradient_checkpointing(True)
    return model, kwargs


def build_loss(config: RunConfig, info: ModelInfo) -> nn.Module:
    name = config.loss.name or info.loss
    defaults = info.loss_kwargs if name == info.loss else {}
    return create_loss(name, **{**defaults, **config.loss.kwargs})


def check_vocabulary(model: nn.Module, tokenizer: SentenceTokenizer, *, pretrained: str | None) -> None:
    """Raise UserError for a tokenizer whose token ids do not fit the model's token embeddings.

    pretrained: where the text encoder's weights come from; None = random ones, which fit any tokenizer that is small
    enough.
    """
    sizes = [module.num_embeddings for module in model.modules() if isinstance(module, nn.Embedding)]
    rows, tokens = max(sizes, default=0), tokenizer.vocab_size
    if rows < tokens or (pretrained is not None and rows != tokens):
        fix = f"set preprocess.tokenizer to the one of {pretrained}" if pretrained else "choose another tokenizer"
        raise UserError(f"the tokenizer has {tokens:,} tokens and the model's text encoder {rows:,}; {fix}")


def write_model_folder(folder: Path, config: RunConfig, components: RunComponents, state_dict: dict[str, Any]) -> None:
    """Write the model of a run as a folder that loads alone, with a record of how it was trained."""
    save_pretrained(
        folder,
        name=config.model.name,
        kwargs=components.model_kwargs,
        state_dict=state_dict,
        preprocess=components.preprocess,
        protocol=components.protocol,
        tokenizer=components.tokenizer,
    )
    write_text(folder / TRAINING_FILE, json.dumps(describe_training(config), indent=2) + "\n")
