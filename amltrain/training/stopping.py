"""How a run ends before its time: requests to stop, failures in one line, steps and weights that are not finite.

Requests: SIGTERM, SIGUSR1 or SIGHUP from a scheduler or terminal, a time limit, a lost launcher, or Ctrl-C. A request
is only noted. The loop looks at it together with all other processes, saves, and leaves with exit code 75 (EX_TEMPFAIL:
try again later), so that the next start resumes there. While there is nothing to save (start-up, evaluation) a run
leaves at once. Launchers of several processes turn every exit code into 1, so the file `requeue` in the output folder
carries the same message. Ctrl-C saves too and leaves with 130, which no scheduler takes for a request to queue the run
again; a second Ctrl-C ends the run immediately.
"""

import errno
import os
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from amltrain.config.schema import RunConfig
from amltrain.data.dataset import ReferDataset
from amltrain.distributed import plan_batches
from amltrain.errors import CTRL_C, CTRL_C_EXIT_CODE, REQUEUE_EXIT_CODE, SIGNALS, UserError, first_line
from amltrain.files import free_space, os_fault
from amltrain.run_folder import mark_requeue

LAUNCHER_CHECK = 1.0
"""Seconds between looks at whether the launcher still lives."""


class Preemption:
    """Whether this process was asked to stop, while it listens. `reason` is None until it was."""

    def __init__(self, time_limit_hours: float | None = None) -> None:
        self.reason: str | None = None
        self.deadline = None if time_limit_hours is None else time.monotonic() + time_limit_hours * 3600
        self._leave: Callable[[], None] | None = None

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Note signals instead of dying from them; afterwards they do what they did before.

        A signal that is ignored stays ignored: `nohup` starts programs so.
        """
        wanted = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
        before = {number: signal.signal(number, self._note) for number in wanted}
        ended = threading.Event()
        if "TORCHELASTIC_RUN_ID" in os.environ:
            threading.Thread(target=self._watch_launcher, args=(os.getppid(), ended), daemon=True).start()
        try:
            yield
        finally:
            ended.set()
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextmanager
    def leaving_at_once(self, leave: Callable[[], None], *, time_limit: bool = False) -> Iterator[None]:
        """Call `leave`, which raises, as soon as there is a request, without waiting for the next step.

        time_limit: a time that is over counts too. It does not before the first step: every start must make progress.
        """
        outer, self._leave = self._leave, leave
        try:
            if self.reason is not None or (time_limit and self.requested()):
                leave()
            yield
        finally:
            self._leave = outer

    def leave(self, output: Path, *, started: bool = False) -> NoReturn:
        """End this process with the exit code of the reason. started: the run has its folder, or had it."""
        if self.reason == CTRL_C:
            raise SystemExit(CTRL_C_EXIT_CODE)
        mark_requeue(output, True, make=not started)  # by whichever process leaves: another may not get that far
        raise SystemExit(REQUEUE_EXIT_CODE)

    def requested(self) -> bool:
        """Whether this process was asked to stop, or its time is over."""
        if self.reason is None and self.deadline is not None and time.monotonic() > self.deadline:
            self.reason = "the time limit"
        return self.reason is not None

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.reason == CTRL_C:
            raise KeyboardInterrupt
        self.reason = signal.Signals(number).name
        if self._leave is not None:
            self._leave()

    def _watch_launcher(self, launcher: int, ended: threading.Event) -> None:
        """Request a stop when torchrun has ended: its processes would outlive it and block the next start."""
        while not ended.wait(LAUNCHER_CHECK):
            if os.getppid() != launcher:
                self.reason = self.reason or "the launcher is gone"
                return


TOO_MANY_FILES = (errno.EMFILE, errno.ENFILE)
NO_FILES = ("Too many open files", "ancdata")
"""Words in torch's errors about open files, which have no type of their own."""
NO_SHARED_MEMORY = ("shared memory", "/torch_", "Bus error")
"""Words in torch's errors about /dev/shm."""
NO_MEMORY = ("can't allocate memory", "Cannot allocate memory", "std::bad_alloc")
NO_THREADS = ("can't start new thread", "Resource temporarily unavailable", "Thread creation failed")
"""Words in errors of torch and Python about main memory and threads."""
TOO_SMALL = "Expected more than 1 spatial element"
"""Words in torch's error about a norm over one pixel, deep inside a model."""
LOST_PROCESS = ("gloo", "Application timeout", "Connection closed by peer")
"""Words in gloo's errors, which have no type of their own."""


@contextmanager
def explained(config: RunConfig) -> Iterator[None]:
    """Turn these errors of a run into a UserError."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise UserError(_out_of_memory(config)) from error
    except OSError as error:
        if error.errno in TOO_MANY_FILES:
            raise UserError(_out_of_files(config)) from error
        if isinstance(error, (ConnectionError, TimeoutError)) and error.filename is None:
            raise UserError(_lost_process(config, first_line(error))) from error
        raise UserError(os_fault(error, config.folder)) from error
    except ValueError as error:
        if TOO_SMALL not in str(error):
            raise
        raise UserError(
            f"preprocess.size {config.preprocess.size} is too small for {config.model.name}, whose coarsest features "
            f"would be a single pixel; raise it to 64 or more"
        ) from error
    except MemoryError as error:
        raise UserError(_out_of_main_memory(config)) from error
    except RuntimeError as error:
        if any(words in str(error) for words in NO_MEMORY):
            raise UserError(_out_of_main_memory(config)) from error
        if any(words in str(error) for words in NO_THREADS):
            raise UserError(
                f"the system allows no further thread or process: raise the limit (ulimit -u or the container's), "
                f"lower data.workers ({config.data.workers}) or set OMP_NUM_THREADS, and run again to resume"
            ) from error
        what = (str(error).strip().splitlines() or [""])[0]
        if any(words in str(error) for words in NO_FILES):
            raise UserError(_out_of_files(config)) from error
        if any(words in str(error) for words in NO_SHARED_MEMORY):
            raise UserError(
                f"/dev/shm is full, through which loader processes give batches ({free_space(Path('/dev/shm'))}): "
                f"start docker with --shm-size or --ipc=host, or lower data.workers ({config.data.workers}), and run "
                f"again to resume from the last checkpoint"
            ) from error
        if "DataLoader worker" in what:
            raise UserError(
                f"{what} It was probably killed for its memory: lower data.workers ({config.data.workers}) or ask for "
                f"more memory, and run again to resume from the last checkpoint"
            ) from error
        if isinstance(error, torch.distributed.DistError) or any(words in what for words in LOST_PROCESS):
            raise UserError(_lost_process(config, what)) from error
        raise


def drop_frames(error: BaseException | None) -> None:
    """Drop the local variables that an error's frames hold.

    Loader processes end with the iterator that reads from them; a process that exits while it still holds one waits for
    them forever, because they leave signals to the trainer.
    """
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


def _out_of_memory(config: RunConfig) -> str:
    processes, ways = int(os.environ.get("WORLD_SIZE", "1")), []
    micro = plan_batches(config.train, processes).micro
    if micro > 1:
        ways.append(
            f"set train.micro_batch_size to {micro // 2} (the rest of the global batch of "
            f"{config.train.global_batch_size} is accumulated, which keeps the result)"
        )
    if not config.model.gradient_checkpointing:
        ways.append("set model.gradient_checkpointing to true")
    if (config.train.mixed_precision or "no") == "no":
        ways.append("set train.mixed_precision to bf16")
    if config.evaluation.batch_size > 1:
        ways.append("lower evaluation.batch_size if it was evaluating")
    return f"out of memory with {micro} samples per forward pass; " + ", or ".join(ways or ["use a smaller model"])


def _lost_process(config: RunConfig, what: str) -> str:
    minutes = f"{config.train.collective_timeout:g} minutes (train.collective_timeout)"
    return (
        f"another process of this run is gone, or did not answer for {minutes}; see its own output, run again to "
        f"resume from the last checkpoint ({what})"
    )


def _out_of_main_memory(config: RunConfig) -> str:
    return (
        f"out of main memory: lower data.workers ({config.data.workers}) or train.micro_batch_size, or ask for more "
        f"memory, and run again to resume from the last checkpoint"
    )


def _out_of_files(config: RunConfig) -> str:
    return (
        f"too many open files: raise the limit of this shell (ulimit -n 4096), or lower data.workers "
        f"({config.data.workers}), and run again to resume from the last checkpoint"
    )


class NormStatistics:
    """Running statistics of a model's batch norms. A forward pass changes them before anybody knows that it is NaN."""

    def __init__(self, model: nn.Module) -> None:
        norms = [module for module in model.modules() if isinstance(module, _NormBase)]
        self.live: list[Tensor] = [buffer for norm in norms for buffer in norm.buffers(recurse=False)]
        self.kept = [buffer.clone() for buffer in self.live]

    def keep(self) -> None:
        """Remember them as they are; before every optimizer step."""
        for kept, live in zip(self.kept, self.live, strict=True):
            kept.copy_(live)

    def take_back(self) -> None:
        """Restore the saved values."""
        for kept, live in zip(self.kept, self.live, strict=True):
            live.copy_(kept)


def describe_samples(dataset: ReferDataset, sample_ids: Iterable[int]) -> list[dict[str, Any]]:
    """Ids by which a user finds samples in the original files."""
    infos = [(sample_id, dataset.info(sample_id)) for sample_id in sample_ids]
    return [
        {"sample_id": sample_id, "dataset": info.dataset, "image_id": info.image_id, "ref_id": info.ref_id}
        for sample_id, info in infos
    ]


def check_weights(weights: Mapping[str, Tensor], step: int, last_good: str) -> None:
    """Raise UserError if a weight is NaN or infinite: an optimizer can produce them from finite gradients."""
    floats = {name: tensor for name, tensor in weights.items() if tensor.is_floating_point()}
    finite = torch.stack([tensor.isfinite().all().cpu() for tensor in floats.values()]) if floats else torch.ones(1)
    if not finite.all():
        name = list(floats)[int(finite.logical_not().nonzero()[0])]
        raise UserError(
            f"the weights are not finite after step {step} ({name}) and were not saved; lower optim.lr or raise "
            f"optim.eps (last good checkpoint: {last_good})"
        )
