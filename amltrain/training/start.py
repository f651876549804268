"""Starts a run: checks, processes, the output folder with its lock, the data."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from accelerate import Accelerator
from tqdm.auto import tqdm

from amltrain.checkpoints.lock import OutputLock
from amltrain.checkpoints.resume import check_shared, prepare_output
from amltrain.checkpoints.run_folder import step_of
from amltrain.config.schema import RunConfig
from amltrain.data.prepare import ensure_training_data
from amltrain.distributed import PREPARATION, BatchPlan, build_accelerator, on_main_process
from amltrain.hub.push import Publisher, build_publisher
from amltrain.training.callbacks import start_trackers
from amltrain.training.checks import check_before_data
from amltrain.training.preemption import Preemption


class Start(NamedTuple):
    """What a run knows before it builds anything. publisher: on the main process only, if it pushes."""

    accelerator: Accelerator
    plan: BatchPlan
    resume_from: Path | None
    publisher: Publisher | None


@contextmanager
def open_run(config: RunConfig, preemption: Preemption) -> Iterator[Start]:
    """Check the config, connect the processes, lock the output folder, start trackers and prepare data.

    At the end the lock is released, trackers finish and the processes part. A request to stop leaves at once: there is
    nothing to save yet. Raises UserError.
    """
    lock, publishers = OutputLock(config.folder), []
    with preemption.leaving_at_once(lambda: preemption.leave(config.folder)):
        check_before_data(config)
        accelerator, plan = build_accelerator(config)
    log = tqdm.write

    def open_output() -> Path | None:
        publishers.append(build_publisher(config.hub, log))
        return prepare_output(config, log, lock)

    try:
        with preemption.leaving_at_once(lambda: preemption.leave(config.folder)):
            resume_from = on_main_process(accelerator, open_output)
            check_shared(accelerator, config.folder)
            first_step = 0 if resume_from is None else step_of(resume_from)
            on_main_process(accelerator, lambda: start_trackers(accelerator, config, first_step, log))
            on_main_process(accelerator, lambda: ensure_training_data(config.data, log), wait=PREPARATION)
        yield Start(accelerator, plan, resume_from, publishers[0] if publishers else None)
    finally:
        lock.release()
        accelerator.end_training()
