"""Build the components of a run from its config, and check what can be checked before it costs anything.

Only `build_*` functions see the config.
"""

import inspect
import json
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate.utils import parse_flag_from_env
from timm.layers import convert_sync_batchnorm
from torch import nn
from torch.utils.data import DataLoader

from amltrain.checkpoints.resume import describe_training, train_mask_parts
from amltrain.config.fields import check_number, override
from amltrain.config.schema import EvaluationConfig, ModelConfig, Preprocess, Protocol, RunConfig
from amltrain.data.augment import build_augmentations
from amltrain.data.conversations import answer_tokens
from amltrain.data.dataset import ReferDataset
from amltrain.data.loaders import build_eval_loaders, build_tokenizer, build_train_dataset, resolve_splits
from amltrain.data.prepare import check_scenes
from amltrain.data.text import SentenceTokenizer
from amltrain.distributed import BatchPlan, check_trackers
from amltrain.errors import UserError, unknown_name
from amltrain.evaluation.metrics import BOX_METRICS, list_metrics
from amltrain.evaluation.results import run_protocol
from amltrain.files import write_text
from amltrain.hub.base_weights import SOURCES, Base, find_base
from amltrain.hub.model_folder import load_pretrained, load_weights, save_pretrained
from amltrain.losses import create_loss
from amltrain.methods.base import Method, build_method, named_method
from amltrain.models import ModelInfo, RISModel, create_model, model_info
from amltrain.models.registry import TUNING, model_builder, without_tuning
from amltrain.models.tuning import apply_tuning
from amltrain.records import Vocabulary
from amltrain.registry import METHODS, check_options
from amltrain.run_folder import MODEL, TRAINING_FILE
from amltrain.training.optim import check_optimizer

logger = logging.getLogger(__name__)


class RunComponents(NamedTuple):
    """What a run is made of, before Accelerate wraps any of it."""

    method: Method
    dataset: ReferDataset
    eval_loaders: dict[str, DataLoader[Any]]
    tokenizer: SentenceTokenizer
    preprocess: Preprocess
    protocol: Protocol
    model_kwargs: dict[str, Any]
    base: Base | None = None
    """What checkpoints leave out."""


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
    augmentations = build_augmentations(config.data.augment, config.augment_options)
    emptying = [
        name
        for name, augmentation in zip(config.data.augment, augmentations, strict=True)
        if getattr(augmentation, "makes_no_target", False)
    ]
    if emptying and not getattr(loss, "needs_heads", False):
        logger.warning(
            "data.augment has %s, and the loss of %s reads no no-target head: the model learns empty masks from "
            "them, not to say that there is nothing",
            " and ".join(emptying),
            config.model.name,
        )
    if method is None:
        built = build_method(config.method, given, loss, config.method_options, tokenizer.vocabulary)
    else:
        built = named_method(method(given, loss, config.method_options, tokenizer.vocabulary), config.method)
    if config.train.sync_batchnorm and processes > 1 and on_cuda:
        # timm's, because torch's own would drop the activation inside timm's fused batch norms
        built = convert_sync_batchnorm(built)
    if preprocess.conversation:
        check_conversations(config, built)
    mask_parts = train_mask_parts(config)
    dataset = build_train_dataset(
        config.data,
        preprocess,
        tokenizer,
        mask_parts=mask_parts,
        seed=config.seed,
        augmentations=augmentations,
        max_samples=config.train.limit_samples,
        regions=built.needs_regions,
        original=getattr(loss, "reads_original", False) and bool(preprocess.conversation),
        boxes=given.needs_boxes,
        instances=given.needs_instances,
    )
    loaders = build_eval_loaders(
        config.data, preprocess, config.evaluation, protocol, tokenizer, seed=config.seed, boxes=given.needs_boxes
    )
    base = None
    if config.checkpoint.frozen == "left_out":
        base = find_base(given, {key: getattr(config.model, key) for key in SOURCES})
    return RunComponents(built, dataset, loaders, tokenizer, preprocess, protocol, kwargs, base)


def check_conversations(config: RunConfig, method: Method) -> None:
    """Raise UserError for a method that a model which reads conversations cannot be trained with."""
    if method.hides_words:
        raise UserError(
            f"method {config.method} hides words of the sentences, and {config.model.name} reads conversations, where "
            f"they would stay; use supervised or aml, or preprocess.conversation ''"
        )
    if method.hides_images and config.data.sentences_per_image > 1:
        raise UserError(
            f"method {config.method} hides parts of the picture for every sentence, so sentences cannot share one; set "
            f"data.sentences_per_image to 1"
        )


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
    kwargs = {"vocab_size": tokenizer.vocab_size, **_answer_ids(config, tokenizer), **model_kwargs(wanted)}
    start = {
        key: value
        for key, value in (("vision_weights", wanted.vision_weights), ("text_weights", wanted.text_weights))
        if value is not None
    }
    beginning = None if wanted.checkpoint is None else load_pretrained(wanted.checkpoint)
    # weights of a model without updates are loaded before the updates are there
    later = beginning is not None and wanted.lora != beginning.kwargs.get("lora", {})
    model = create_model(wanted.name, **(without_tuning(kwargs) if later else kwargs), **start)
    check_vocabulary(model, tokenizer, pretrained=wanted.text_weights)
    if beginning is not None:
        load_weights(model, beginning.model.state_dict(), str(wanted.checkpoint))
    if later:
        apply_tuning(model, wanted.freeze, wanted.lora)
    if wanted.gradient_checkpointing:
        model.set_gradient_checkpointing(True)
    return model, kwargs


def model_kwargs(wanted: ModelConfig) -> dict[str, Any]:
    """The arguments of `create_model` that a run's config names."""
    return {**wanted.kwargs, **{key: value for key in TUNING if (value := getattr(wanted, key))}}


def check_tuning(wanted: ModelConfig) -> None:
    """Raise UserError for names of modules that the model does not have: it is built without values, in a second."""
    if wanted.freeze or wanted.lora:
        with torch.device("meta"):
            create_model(wanted.name, **model_kwargs(wanted))


def _answer_ids(config: RunConfig, tokenizer: SentenceTokenizer) -> dict[str, Any]:
    """The builder's argument for a model that answers with tokens of its own."""
    style = override(model_info(config.model.name).preprocess, config.preprocess).conversation
    return {"answer_tokens": tokenizer.tokenizer.convert_tokens_to_ids(answer_tokens(style))} if style else {}


def build_loss(config: RunConfig, info: ModelInfo) -> nn.Module:
    """Build the run's loss, by default the model's own."""
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
        base=components.base,
    )
    record = describe_training(config) | {
        "data_fingerprint": components.dataset.fingerprint,
        "evaluated_fingerprints": evaluated_contents(components),
    }
    write_text(folder / TRAINING_FILE, json.dumps(record, indent=2) + "\n")


def evaluated_contents(components: RunComponents) -> dict[str, str]:
    """Fingerprints of the data that a run is scored on, by split; without those that are not known."""
    loaders: dict[str, Any] = {name: loader.dataset for name, loader in components.eval_loaders.items()}
    found = {name: getattr(dataset, "fingerprint", "") for name, dataset in loaders.items()}
    return {name: contents for name, contents in found.items() if contents}


LARGE_FROZEN = 1_000_000
"""Frozen parameters with random values from which on a run is rejected; tiny models have fewer."""
LARGE_RANDOM = 20_000_000
"""Parameters of a full-size model, whose random start deserves a warning."""
PREFETCHED = 2
"""Batches that a loader process keeps ready."""


def check_before_data(config: RunConfig) -> None:
    """Raise UserError for a value or combination that cannot work, before anything is prepared or built."""
    info = model_info(config.model.name)
    kind = METHODS.options(config.method)
    check_optimizer(config.optim)
    check_options(config.method_options if config.method_options is not None else kind())
    build_loss(config, info)
    check_tuning(config.model)
    check_metric_name(config.evaluation)
    check_trackers(config.tracking.trackers)
    resolve_splits(config.evaluation.splits, config.data.datasets, config.data.prepared)
    if config.optim.per_epoch and config.optim.warmup_steps:
        raise UserError(
            "optim.per_epoch moves the rate once per epoch, so optim.warmup_steps has no place; give "
            "optim.first_epochs, e.g. [0.25, 0.5, 0.75]"
        )
    if config.optim.epoch_lag and not config.optim.per_epoch:
        raise UserError("optim.epoch_lag belongs to optim.per_epoch=true; set both, or remove it")
    if config.train.epochs is None and config.train.max_steps is None:
        raise UserError("give train.epochs or train.max_steps")
    length = "epochs" if config.train.max_steps is None else "max_steps"
    check_number("train.stop_after", config.train.stop_after, 1, getattr(config.train, length))
    on_cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    precision = config.train.mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if on_cpu and precision == "fp16":
        raise UserError("fp16 needs a GPU; set train.mixed_precision to bf16 or no")
    if config.model.checkpoint is not None:
        _check_path(config.model.checkpoint, "model.checkpoint")
    for key in ("vision_weights", "text_weights"):
        value = getattr(config.model, key)
        if value is not None and (value.startswith((".", "/", "~")) or value.count("/") > 1):
            _check_path(value, f"model.{key}")
    check_open_files(config.data.workers)


def check_components(config: RunConfig, components: RunComponents, plan: BatchPlan, log: Callable[[str], None]) -> None:
    """Raise UserError, or log a warning, for what only the built components show."""
    check_best_metric(config.evaluation, list(components.eval_loaders))
    metric = config.evaluation.best_metric.rpartition("/")[2]
    if metric in BOX_METRICS and not components.method.model.needs_boxes:
        raise UserError(f"evaluation.best_metric is {metric}, and {config.model.name} gives no box; name oIoU or mIoU")
    samples = len(components.dataset)
    if plan.samples > samples:
        log(
            f"WARNING: train.global_batch_size is {plan.samples} and the training set has {samples:,} samples: every "
            f"batch holds samples more than once"
        )
    _check_random_weights(config, components.method.model, log)
    if config.data.workers:
        check_shared_memory(components.dataset, config, plan)


def weights_origin(config: RunConfig, model: nn.Module) -> str:
    """Describe the origin of every encoder's weights, in one line for the header."""
    if config.model.checkpoint is not None:
        return f"all from {config.model.checkpoint}"
    frozen = frozen_parameters(model)
    lines = []
    for encoder, given in (("vision", config.model.vision_weights), ("text", config.model.text_weights)):
        if f"{encoder}_weights" not in inspect.signature(model_builder(config.model.name)).parameters:
            continue
        state = f", {frozen[encoder] / 1e6:.2f} M frozen" if frozen[encoder] else ""
        lines.append(f"{encoder} {given or 'random'}{state}")
    return "; ".join([*lines, "everything else random"])


def frozen_parameters(model: nn.Module) -> dict[str, int]:
    """Count the parameters that do not train, of the vision and of the text encoder."""
    counts = {"vision": 0, "text": 0}
    for name, child in model.named_children():
        encoder = "text" if name.startswith(("text", "reader")) else "vision"
        counts[encoder] += sum(p.numel() for p in child.parameters() if not p.requires_grad)
    return counts


def _check_random_weights(config: RunConfig, model: nn.Module, log: Callable[[str], None]) -> None:
    if config.model.checkpoint is not None:
        return
    given = {"vision": config.model.vision_weights, "text": config.model.text_weights}
    for encoder, count in frozen_parameters(model).items():
        if given[encoder] is None and count >= LARGE_FROZEN and not config.model.allow_random_frozen:
            raise UserError(
                f"{config.model.name} keeps {count / 1e6:.2f} M parameters of its {encoder} encoder frozen, and they "
                f"are random: set model.{encoder}_weights or model.checkpoint (or model.allow_random_frozen to true)"
            )
    missing = [f"model.{encoder}_weights" for encoder, source in given.items() if source is None]
    if missing and sum(p.numel() for p in model.parameters()) >= LARGE_RANDOM:
        log(f"WARNING: {config.model.name} starts from random encoders; {' and '.join(missing)} not given")


def _check_path(value: str, key: str) -> None:
    looks_local = value.startswith((".", "/", "~")) or value.partition("@")[0].count("/") != 1
    if looks_local and not Path(value).expanduser().exists():
        raise UserError(f"{key}: there is no {value}; correct the path")


def check_open_files(workers: int) -> None:
    """Raise the limit of open files to what loader processes need. Raises UserError where the system forbids it."""
    if os.name == "nt":  # there is no such limit, and no module that reads it
        return
    import resource

    needed = 128 + 64 * workers
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return
    if hard != resource.RLIM_INFINITY and hard < needed:
        raise UserError(
            f"this shell allows {hard} open files and a run with data.workers={workers} needs about {needed}; raise "
            f"the limit (ulimit -n {needed}) or lower data.workers"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


def check_shared_memory(dataset: ReferDataset, config: RunConfig, plan: BatchPlan) -> None:
    """Raise UserError if /dev/shm is too small for the batches that loader processes keep ready."""
    shared = Path("/dev/shm")
    if not shared.is_dir():
        return
    sample = sum(field.numel() * field.element_size() for field in dataset[0] if isinstance(field, torch.Tensor))
    needed = sample * plan.micro * config.data.workers * PREFETCHED * min(plan.processes, os.cpu_count() or 1)
    usage = shutil.disk_usage(shared)
    if needed > usage.free:
        raise UserError(
            f"/dev/shm has {usage.free / 2**20:,.0f} MiB free and loading data needs about {needed / 2**20:,.0f}: "
            f"start docker with --shm-size or --ipc=host, or lower data.workers or train.micro_batch_size"
        )


def check_metric_name(evaluation: EvaluationConfig) -> None:
    """Raise UserError for a best_metric that does not exist."""
    metric = evaluation.best_metric.rpartition("/")[2]
    if metric not in list_metrics():
        raise unknown_name("evaluation.best_metric", metric, list_metrics())


def check_best_metric(evaluation: EvaluationConfig, splits: list[str]) -> None:
    """Raise UserError for a best_metric of a split that is not evaluated."""
    split = evaluation.best_metric.rpartition("/")[0]
    if split and split not in splits:
        raise UserError(f"evaluation.best_metric names split {split!r}; evaluated are {', '.join(splits)}")
