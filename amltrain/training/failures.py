"""Turn out-of-memory, full-disk and lost-process errors into one-line messages."""

import errno
import shutil
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from amltrain.config.schema import RunConfig
from amltrain.errors import UserError

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
FORBIDDEN = (errno.EROFS, errno.EACCES, errno.EPERM)
TOO_MANY_FILES = (errno.EMFILE, errno.ENFILE)
NO_FILES = ("Too many open files", "ancdata")
"""Words in torch's errors about open files, which have no type of their own."""
NO_SHARED_MEMORY = ("shared memory", "/torch_", "Bus error")
"""Words in torch's errors about /dev/shm."""
LOST_PROCESS = ("gloo", "Application timeout", "Connection closed by peer")
"""Words in gloo's errors, which have no type of their own."""


@contextmanager
def explained(config: RunConfig, micro: int) -> Iterator[None]:
    """Turn these errors of a run into a UserError. micro: samples per forward pass."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise UserError(_out_of_memory(config, micro)) from error
    except OSError as error:
        if error.errno in TOO_MANY_FILES:
            raise UserError(_out_of_files(config)) from error
        gone = error.errno == errno.ENOENT and not config.folder.is_dir()
        if not gone and error.errno not in (*NO_ROOM, *FORBIDDEN):
            raise
        name = error.filename or config.folder
        raise UserError(f"cannot write {name}: {error.strerror} ({way_out(error, config.folder)})") from error
    except RuntimeError as error:
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
            minutes = f"{config.train.collective_timeout:g} minutes (train.collective_timeout)"
            raise UserError(
                f"another process of this run is gone, or did not answer for {minutes}; see its own output, run "
                f"again to resume from the last checkpoint ({what})"
            ) from error
        raise


def drop_frames(error: BaseException | None) -> None:
    """Drop the local variables that an error's frames hold.

    Loader processes end with the iterator that reads from them; a process that exits while it still holds one waits for
    them forever, because they leave signals to the trainer.
    """
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


def _out_of_memory(config: RunConfig, micro: int) -> str:
    ways = []
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


def _out_of_files(config: RunConfig) -> str:
    return (
        f"too many open files: raise the limit of this shell (ulimit -n 4096), or lower data.workers "
        f"({config.data.workers}), and run again to resume from the last checkpoint"
    )


def way_out(error: Exception | None, folder: Path) -> str:
    """Describe what to do about a file below `folder` that could not be written."""
    number = getattr(error, "errno", None)
    if not folder.is_dir():
        return f"{folder} is gone; run again, which starts from its beginning unless a copy is put back"
    if number in FORBIDDEN:
        return f"{free_space(folder)}; saved checkpoints are intact, make {folder} writable and run again"
    return f"{free_space(folder)}; saved checkpoints are intact, make room and run again"


def free_space(folder: Path) -> str:
    """Describe the free space on a folder's disk."""
    try:
        return f"{shutil.disk_usage(folder).free / 1e6:,.0f} MB are free there"
    except OSError:
        return f"{folder} is gone"
