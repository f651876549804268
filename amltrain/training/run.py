"""One training run: everything that the loop and its callbacks work with, built from the config.

check the config -> connect the processes -> lock the output folder -> prepare data -> build and wrap -> resume
"""

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel
from tqdm.auto import tqdm

from amltrain.checkpoints.lock import OutputLock
from amltrain.checkpoints.resume import (
    Progress,
    check_shared,
    compare_surroundings,
    prepare_output,
    resume_progress,
    write_config,
)
from amltrain.checkpoints.saver import Saver
from amltrain.config.schema import RunConfig, TrainConfig
from amltrain.data.loaders import build_sampler, collate
from amltrain.data.prepare import ensure_training_data
from amltrain.data.transforms import prepare_batch
from amltrain.distributed import (
    PREPARATION,
    BatchPlan,
    agree,
    build_accelerator,
    is_sharded,
    on_main_process,
    prepare,
    set_tf32,
    shard,
    skip_bad_steps,
)
from amltrain.environment import library_versions
from amltrain.errors import UserError, same_on_every_process
from amltrain.evaluation.results import Results
from amltrain.hub.push import check_access
from amltrain.methods.base import Method
from amltrain.models.base import RISModel
from amltrain.records import Batch, Draw
from amltrain.run_folder import LOG_FILE, step_of
from amltrain.training.build import (
    MethodBuilder,
    RunComponents,
    build_components,
    check_before_data,
    check_components,
    evaluated_contents,
    write_model_folder,
)
from amltrain.training.optim import (
    ADAM,
    arguments,
    average_weights,
    blocks_called_whole,
    build_optimizer,
    compile_blocks,
    optimizer_groups,
)
from amltrain.training.stopping import Preemption, check_weights
from amltrain.training.tracking import History, Meter, start_trackers

SETUP_SAMPLES = 64
"""First samples of a new run that a method is set up on."""


@dataclass
class Run:
    """A run that is ready to train.

    method, optimizer: prepared by Accelerate. ema: the averaged model, or None. whole_model: a copy to fill with whole
    weights where the method is sharded, else None. total_steps: of the schedule; last_step: where the run ends.
    results: of the last evaluation.
    """

    config: RunConfig
    accelerator: Accelerator
    plan: BatchPlan
    preemption: Preemption
    components: RunComponents
    method: nn.Module
    optimizer: Optimizer
    ema: AveragedModel | None
    whole_model: nn.Module | None
    total_steps: int
    last_step: int
    steps_per_epoch: int
    progress: Progress
    saver: Saver
    meter: Meter
    history: History
    callbacks: list["Callback"]
    resumed: bool
    results: list[Results] = field(default_factory=list)

    @property
    def output(self) -> Path:
        """The output folder."""
        return self.config.folder

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and prints."""
        return self.accelerator.is_main_process

    @property
    def bare_method(self) -> Method:
        """The method without Accelerate's wrapper."""
        return self.accelerator.unwrap_model(self.method)

    def log(self, text: str) -> None:
        """Print a line on the main process."""
        if self.is_main:
            tqdm.write(text)

    def track(self, values: dict[str, float]) -> None:
        """Send values of this step to the trackers and to log.jsonl."""
        self.accelerator.log(values, step=self.progress.step)
        self.history.add(self.progress.step, values)

    def falls_on(self, interval: int, step: int | None = None) -> bool:
        """Whether a step (None: the current one) is the last one, or one of every `interval`."""
        step = self.progress.step if step is None else step
        return step % interval == 0 or step == self.last_step

    @property
    def evaluation_interval(self) -> int:
        """Steps between evaluations."""
        return self.config.evaluation.every_steps or self.steps_per_epoch

    def evaluation_is_due(self) -> bool:
        """Whether this step wants an evaluation that it has not had."""
        wanted = self.progress.evaluated < self.progress.step and bool(self.components.eval_loaders)
        return wanted and self.falls_on(self.evaluation_interval)

    def inference_model(self) -> nn.Module:
        """The model to evaluate, whole; every process calls."""
        if self.ema is not None:
            return self.ema.module
        if self.whole_model is not None:
            self.whole_model.load_state_dict(self.saver.weights())
            return self.whole_model
        return self.bare_method.model


@dataclass
class Step:
    """One optimizer step that was taken: averages over its micro-batches and over the processes.

    lr: of the first parameter group. extras: the method's scalars. results: what each of this process's micro-batches
    returned, on the device.
    """

    loss: float
    grad_norm: float
    stop: bool
    save_failed: bool
    extras: dict[str, float]
    lr: float = 0.0
    lr_factor: float = 0.0
    results: list[dict[str, Tensor]] = field(default_factory=list)

    @property
    def finite(self) -> bool:
        """Whether loss and gradient were finite; the weights did not change otherwise."""
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)


class Callback:
    """What a run does beside training; every method is optional, and every process calls it.

    `run.is_main` says whether this process may write files. A callback must not change the weights, and must not wait
    for other processes unless all of them do. Numbers that a resumed run needs are `state_dict()`.
    """

    def on_start(self, run: Run) -> None:
        """The run is built, and not a step is taken since it was started or resumed."""

    def on_step(self, run: Run, step: Step) -> None:
        """An optimizer step was taken; `run.progress.step` counts it."""

    def on_evaluation(self, run: Run, results: dict[str, Results]) -> None:
        """Every split was scored: results by `data set:split` or split, as in the table."""

    def before_save(self, run: Run) -> None:
        """A checkpoint will be written with `run.progress`."""

    def on_save(self, run: Run, checkpoint: Path) -> None:
        """A checkpoint is complete on the disk; on the main process only."""

    def on_scores(self, run: Run, checkpoint: Path, *, best: bool) -> None:
        """A checkpoint has got its scores; on the main process only. best: it is the best so far."""

    def on_finish(self, run: Run) -> None:
        """The run reached its end."""

    def on_stop(self, run: Run) -> None:
        """The run ends in whatever way: finished, stopped or failed. Called once, also after an error."""

    def state_dict(self) -> Any:
        """JSON values that a resumed run hands to `load_state_dict`; None = nothing to keep."""
        return None

    def load_state_dict(self, state: Any) -> None:
        """Continue with what `state_dict` returned; called before `on_start`."""


@contextmanager
def open_run(
    config: RunConfig,
    preemption: Preemption,
    *,
    callbacks: Sequence[Callback] = (),
    model: RISModel | None = None,
    method: MethodBuilder | None = None,
) -> Iterator[Run]:
    """Build a run, new or resumed; at the end its lock is released, trackers finish and the processes part.

    callbacks: in the order in which they are called. model, method: instead of building those that the config names. A
    request to stop leaves at once: there is nothing to save yet. Raises UserError.
    """
    lock = OutputLock(config.folder)
    log = tqdm.write
    with preemption.leaving_at_once(lambda: preemption.leave(config.folder)), same_on_every_process():
        check_before_data(config)
        accelerator, plan = build_accelerator(config)

    def open_output() -> Path | None:
        if config.hub.push != "never":
            check_access(str(config.hub.repo))
        return prepare_output(config, log, lock)

    try:
        with preemption.leaving_at_once(lambda: preemption.leave(config.folder)):
            resume_from = on_main_process(accelerator, open_output)
            check_shared(accelerator, config.folder)
            first_step = 0 if resume_from is None else step_of(resume_from)
            on_main_process(accelerator, lambda: start_trackers(accelerator, config, first_step, log))
            on_main_process(accelerator, lambda: ensure_training_data(config.data, log), wait=PREPARATION)
            run = build_run(
                config, accelerator, plan, preemption, list(callbacks), resume_from, model=model, method=method
            )
        yield run
    finally:
        lock.release()
        accelerator.end_training()


def build_run(
    config: RunConfig,
    accelerator: Accelerator,
    plan: BatchPlan,
    preemption: Preemption,
    callbacks: list[Callback],
    resume_from: Path | None,
    *,
    model: RISModel | None = None,
    method: MethodBuilder | None = None,
) -> Run:
    """Build data, model, method and optimizer; set a new run's method up, or load the checkpoint. Raises UserError."""

    def log(text: str) -> None:
        if accelerator.is_main_process:
            tqdm.write(text)

    check_engine_takes(config.optim.optimizer, accelerator)
    set_tf32(config.train.tf32)
    on_cuda = accelerator.device.type == "cuda"
    components = build_components(
        config, processes=plan.processes, on_cuda=on_cuda, resume_from=resume_from, model=model, method=method
    )
    check_components(config, components, plan, log)
    bare = components.method.to(accelerator.device)
    if resume_from is None:
        for line in bare.setup(_first_batches(accelerator, config, components, plan), accelerator.reduce):
            log(line)
    ema = _average(accelerator, config, bare.model)
    wrapped, optimizer, whole_model = _wrap(config, accelerator, components, bare, log)
    saver = Saver(
        accelerator,
        config.folder,
        wrapped,
        optimizer,
        ema,
        keep=config.checkpoint.keep,
        write_model=_model_writer(config, components),
        base=components.base,
    )
    progress = _progress(config, accelerator, plan, components, saver, resume_from, log)
    for callback in callbacks if resume_from is not None else ():
        callback.load_state_dict(progress.callbacks.get(type(callback).__name__))
    total, last, epoch = count_steps(config.train, len(components.dataset), plan)
    if progress.step > last:
        raise UserError(
            f"{config.folder} is at step {progress.step:,}, beyond the {last:,} steps that the run shall have; give a "
            f"larger train.max_steps, train.epochs or train.stop_after, or another output"
        )
    on_main_process(accelerator, lambda: write_config(config))
    history = History(config.folder / LOG_FILE, progress.log_lines, enabled=accelerator.is_main_process)
    meter = Meter(plan.samples, accelerator.device)
    return Run(
        config, accelerator, plan, preemption, components, wrapped, optimizer, ema, whole_model, total, last, epoch,
        progress, saver, meter, history, callbacks, resume_from is not None,
    )  # fmt: skip


def _wrap(
    config: RunConfig, accelerator: Accelerator, components: RunComponents, bare: Method, log: Callable[[str], None]
) -> tuple[nn.Module, Optimizer, nn.Module | None]:
    """Compile, shard and wrap the method; returns it with its optimizer, and `Run.whole_model`."""
    # a sharded model runs only through its wrapper: evaluation gets a whole one to fill
    whole_model = copy.deepcopy(bare.model) if is_sharded(accelerator) else None
    if bare.before_step_needs_weights and is_sharded(accelerator):
        raise UserError(
            f"method {bare.name} with these options needs whole weights between steps; "
            "change them, or use DDP or ZeRO-1/2"
        )
    if config.train.compile:
        log(f"compiling {compile_blocks(bare)} blocks as they are first used")
    if accelerator.distributed_type == DistributedType.FSDP:
        shard(accelerator, bare, blocks_called_whole(bare, _two_samples(components, accelerator)))
    o = config.optim
    optimizer = build_optimizer(optimizer_groups(bare, o), **arguments(o))
    wrapped, optimizer = prepare(accelerator, bare, optimizer)
    skip_bad_steps(accelerator, optimizer)
    wrapped.train()
    return wrapped, optimizer, whole_model


def _progress(
    config: RunConfig,
    accelerator: Accelerator,
    plan: BatchPlan,
    components: RunComponents,
    saver: Saver,
    resume_from: Path | None,
    log: Callable[[str], None],
) -> Progress:
    """Where the run stands, the checkpoint loaded if there is one. Every process checks that all have the same data."""
    progress = Progress(
        spread=list(plan),
        seed=config.seed,
        samples=len(components.dataset),
        data=components.dataset.fingerprint,
        engine=accelerator.distributed_type.value.lower(),
    )
    agree(accelerator, {"training data": progress.data, **evaluated_contents(components), **library_versions()})
    if resume_from is not None:
        compare_surroundings(resume_from, evaluated_contents(components), log)
        progress = resume_progress(saver, resume_from, progress, config.folder, log)
    return progress


def check_engine_takes(optimizer: str, accelerator: Accelerator) -> None:
    """Raise UserError for an optimizer that reads whole parameters, under an engine that cuts them into pieces."""
    engine = accelerator.distributed_type
    if optimizer not in ADAM and engine in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        raise UserError(
            f"optim.optimizer {optimizer} has not been tried on the parts of parameters that {engine.value} keeps; use "
            f"adamw, or DDP"
        )


def count_steps(train: TrainConfig, samples: int, plan: BatchPlan) -> tuple[int, int, int]:
    """Optimizer steps of the schedule, of the run (which `train.stop_after` shortens), and of an epoch."""
    epoch = max(1, round(samples / plan.samples))
    if train.max_steps is not None:
        return train.max_steps, train.stop_after or train.max_steps, epoch
    if train.epochs is None:
        raise UserError("give train.epochs or train.max_steps")
    total = max(1, train.epochs * samples // plan.samples)
    return total, total if train.stop_after is None else min(total, train.stop_after * epoch), epoch


def _model_writer(config: RunConfig, components: RunComponents) -> Callable[[Path, dict[str, Any], int, str], None]:
    def write(folder: Path, weights: dict[str, Any], step: int, last_good: str) -> None:
        check_weights(weights, step, last_good)
        write_model_folder(folder, config, components, weights)

    return write


def _average(accelerator: Accelerator, config: RunConfig, model: nn.Module) -> AveragedModel | None:
    decay = config.train.ema_decay
    if decay is None:
        return None
    if is_sharded(accelerator):
        raise UserError("train.ema_decay needs whole weights on every process: use DDP, or leave it out")
    return average_weights(model, decay)


def _two_samples(components: RunComponents, accelerator: Accelerator) -> Batch:
    """The same two samples on every process."""
    samples = [components.dataset[Draw(0, index)] for index in (0, len(components.dataset) - 1)]
    return prepare_batch(collate(samples), components.preprocess.normalization, accelerator.device)


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
        yield prepare_batch(batch, components.dataset.transform.normalization, accelerator.device)
