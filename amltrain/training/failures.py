"""What no code here can prevent (memory, disk, killed processes), as one sentence with the way out."""

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
LOST_PROCESS = ("gloo", "Application timeout", "Connection closed by peer")
"""What gloo's errors say, which have no type of their own."""


@contextmanager
def explained(config: RunConfig, micro: int) -> Iterator[None]:
    """Turn such errors of a run into a UserError. micro: samples per forward pass."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise UserError(_out_of_memory(config, micro)) from error
    except OSError as error:
        if error.errno not in NO_ROOM:
            raise
        name = error.filename or config.output
        raise UserError(
            f"cannot write {name}: {error.strerror} ({free_space(Path(config.output))}); saved checkpoints are intact, "
            f"make room and run again"
        ) from error
    except RuntimeError as error:
        what = (str(error).strip().splitlines() or [""])[0]
        if "DataLoader worker" in what:
            raise UserError(
                f"{what} It was probably killed for its memory: lower data.workers ({config.data.workers}) or ask for "
                f"more memory, and run again to go on from the last checkpoint"
            ) from error
        if isinstance(error, torch.distributed.DistError) or any(words in what for words in LOST_PROCESS):
            minutes = f"{config.train.collective_timeout:g} minutes (train.collective_timeout)"
            raise UserError(
                f"another process of this run is gone, or did not answer for {minutes}; its own output says why, run "
                f"again to go on from the last checkpoint ({what})"
            ) from error
        raise


def release(error: BaseException | None) -> None:
    """Let go of what the frames of an error hold. Loader processes end with the iterator that reads from them, and a
    process that ends while it has some waits for them for ever: they leave signals to the trainer."""
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


def free_space(folder: Path) -> str:
    """How much room is left where a folder lies."""
    return f"{shutil.disk_usage(folder).free / 1e6:,.0f} MB are free there"
