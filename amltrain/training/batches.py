"""The micro-batches of a run, one optimizer step's after the other."""

from collections.abc import Callable, Iterator
from contextlib import nullcontext

from accelerate import Accelerator

from amltrain.config.schema import RunConfig
from amltrain.data.dataset import ReferDataset
from amltrain.data.loaders import build_train_loader
from amltrain.data.transforms import prepare_batch
from amltrain.distributed import BatchPlan
from amltrain.records import Batch
from amltrain.training.preemption import Preemption
from amltrain.training.tracking import Meter


def step_batches(
    accelerator: Accelerator,
    dataset: ReferDataset,
    config: RunConfig,
    plan: BatchPlan,
    *,
    first_step: int,
    total_steps: int,
    meter: Meter,
    preemption: Preemption,
    stop: Callable[[], None],
) -> Iterator[list[Batch]]:
    """Yield this process's micro-batches of every optimizer step from `first_step` on.

    stop: called, and must raise, when a request to stop comes while one process waits for data; several processes
    answer it in the step, together. A loader that gives nothing for `train.loader_timeout` minutes raises RuntimeError.
    """
    loader = build_train_loader(
        dataset,
        config.data,
        seed=config.seed,
        global_batch_size=plan.samples,
        micro_batch_size=plan.micro,
        total_steps=total_steps,
        first_step=first_step,
    )
    if loader.num_workers > 0:
        loader.timeout = 60 * config.train.loader_timeout
    batches = iter(accelerator.prepare_data_loader(loader))
    while True:
        step: list[Batch] = []
        while len(step) < plan.accumulation:
            alone = accelerator.num_processes == 1
            with meter.waiting(), preemption.leaving_at_once(stop) if alone else nullcontext():
                try:
                    step.append(prepare_batch(next(batches), dataset.transform.normalization))
                except StopIteration:
                    return
        yield step
