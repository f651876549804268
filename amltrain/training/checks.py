"""Checks before a run costs anything, and after its components are built."""

import inspect
import os
import resource
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate.utils import parse_flag_from_env
from torch import nn

from amltrain.config.fields import check_number
from amltrain.config.schema import RunConfig
from amltrain.data.dataset import ReferDataset
from amltrain.data.loaders import resolve_splits
from amltrain.distributed import BatchPlan, check_trackers
from amltrain.errors import UserError
from amltrain.models import model_info
from amltrain.models.registry import model_builder
from amltrain.registry import METHODS, check_options
from amltrain.training.build import RunComponents, build_loss
from amltrain.training.validation import check_best_metric, check_metric_name

LARGE_FROZEN = 1_000_000
"""Frozen parameters with random values from which on a run is refused; tiny models have fewer."""
LARGE_RANDOM = 20_000_000
"""Parameters of a full-size model, whose random start deserves a warning."""
PREFETCHED = 2
"""Batches that a loader process keeps ready."""


def check_before_data(config: RunConfig) -> None:
    """Raise UserError for a value or combination that cannot work, before anything is prepared or built."""
    info = model_info(config.model.name)
    kind = METHODS.options(config.method)
    check_options(config.method_options if config.method_options is not None else kind())
    build_loss(config, info)
    check_metric_name(config.evaluation)
    check_trackers(config.tracking.trackers)
    resolve_splits(config.evaluation.splits, config.data.datasets, config.data.prepared)
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
        encoder = "text" if name.startswith("text") else "vision"
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
