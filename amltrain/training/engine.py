"""Everything that the loop computes with: built from the config, set up or not yet resumed, wrapped by Accelerate."""

import copy
from collections.abc import Callable, Iterator
from typing import NamedTuple

from accelerate import Accelerator
from accelerate.utils import send_to_device
from torch import nn
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from amltrain.config.schema import RunConfig, TrainConfig
from amltrain.data.loaders import build_sampler, collate
from amltrain.data.transforms import normalise_batch
from amltrain.distributed import BatchPlan, check_shardable, is_sharded, skip_bad_steps
from amltrain.errors import UserError
from amltrain.methods.base import Method, Recorder
from amltrain.records import Batch
from amltrain.training.build import RunComponents, build_components
from amltrain.training.checks import check_components
from amltrain.training.optim import build_optimizer, compile_blocks
from amltrain.training.start import Start

SETUP_SAMPLES = 64


class Engine(NamedTuple):
    """A run's components and what computes with them.

    method, optimizer: prepared by Accelerate. ema: the averaged model, or None. whole_model: a copy to fill with whole
    weights where the method is sharded, else None. recorder: of the method's statistics, or None. total_steps: of the
    schedule; last_step: where the run ends.
    """

    components: RunComponents
    method: nn.Module
    optimizer: Optimizer
    ema: AveragedModel | None
    whole_model: nn.Module | None
    recorder: Recorder | None
    total_steps: int
    last_step: int
    steps_per_epoch: int


def build_engine(config: RunConfig, start: Start, log: Callable[[str], None]) -> Engine:
    """Build data, model, method and optimizer; set the method up if the run is new. Raises UserError."""
    accelerator, plan = start.accelerator, start.plan
    on_cuda = accelerator.device.type == "cuda"
    components = build_components(config, processes=plan.processes, on_cuda=on_cuda, resume_from=start.resume_from)
    check_components(config, components, plan, log)
    method = components.method.to(accelerator.device)
    if start.resume_from is None:
        for line in method.setup(_first_batches(accelerator, config, components, plan), accelerator.reduce):
            log(line)
    o = config.optim
    optimizer = build_optimizer(
        method.param_groups(o.lr, o.weight_decay), o.optimizer, lr=o.lr, betas=o.betas, eps=o.eps, amsgrad=o.amsgrad
    )
    ema = _average(accelerator, config, method.model)
    # a sharded model runs only through its wrapper: evaluation gets a whole one to fill
    whole_model = copy.deepcopy(method.model) if is_sharded(accelerator) else None
    recorder = method.recorder(components.dataset, config.folder, accelerator.device)
    if method.before_step_needs_weights and is_sharded(accelerator):
        raise UserError(
            f"method {method.name} with these options needs whole weights between steps; "
            "change them, or use DDP or ZeRO-1/2"
        )
    if config.train.compile:
        log(f"compiling {compile_blocks(method)} blocks as they are first used")
    check_shardable(accelerator, method)
    wrapped, optimizer = accelerator.prepare(method, optimizer)
    skip_bad_steps(accelerator, optimizer)
    wrapped.train()
    total, last, epoch = count_steps(config.train, len(components.dataset), plan)
    return Engine(components, wrapped, optimizer, ema, whole_model, recorder, total, last, epoch)


def count_steps(train: TrainConfig, samples: int, plan: BatchPlan) -> tuple[int, int, int]:
    """Optimizer steps of the schedule, of the run (which `train.stop_after` shortens), and of an epoch."""
    epoch = max(1, round(samples / plan.samples))
    if train.max_steps is not None:
        return train.max_steps, train.stop_after or train.max_steps, epoch
    if train.epochs is None:
        raise UserError("give train.epochs or train.max_steps")
    total = max(1, train.epochs * samples // plan.samples)
    return total, total if train.stop_after is None else min(total, train.stop_after * epoch), epoch


def _average(accelerator: Accelerator, config: RunConfig, model: Method | nn.Module) -> AveragedModel | None:
    decay = config.train.ema_decay
    if decay is None:
        return None
    if is_sharded(accelerator):
        raise UserError("train.ema_decay needs whole weights on every process: use DDP, or leave it out")
    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)


def _first_batches(
    accelerator: Accelerator, config: RunConfig, components: RunComponents, plan: BatchPlan
) -> Iterator[Batch]:
    """Return this process's share of the first samples of the run."""
    sampler = build_sampler(
        components.dataset,
        config.data,
        seed=config.seed,
        global_batch_size=max(SETUP_SAMPLES, plan.processes),
        total_steps=1,
    )
    draws = list(sampler)[accelerator.process_index :: plan.processes]
    for start in range(0, len(draws), plan.micro):
        batch = collate([components.dataset[draw] for draw in draws[start : start + plan.micro]])
        batch = send_to_device(batch, accelerator.device)
        yield normalise_batch(batch, components.dataset.transform.normalization)
