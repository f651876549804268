"""Turn out-of-memory, full-disk and lost-process errors into one-line messages.

Undo the changes of a non-finite step, list its samples, and detect non-finite weights.
"""

import errno
import os
import traceback
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from amltrain.config.schema import RunConfig
from amltrain.data.dataset import ReferDataset
from amltrain.distributed import plan_batches
from amltrain.errors import UserError
from amltrain.files import FORBIDDEN, NO_ROOM, free_space, way_out

TOO_MANY_FILES = (errno.EMFILE, errno.ENFILE)
NO_FILES = ("Too many open files", "ancdata")
"""Words in torch's errors about open files, which have no type of their own."""
NO_SHARED_MEMORY = ("shared memory", "/torch_", "Bus error")
"""Words in torch's errors about /dev/shm."""
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
