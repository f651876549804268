"""What every measurement of the suite shares."""

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.optim import Optimizer

from amltrain.config.schema import OptimConfig
from amltrain.distributed import set_tf32
from amltrain.losses import create_loss
from amltrain.methods.base import Method, build_method
from amltrain.models import create_model, model_info
from amltrain.records import Batch
from amltrain.training.optim import build_optimizer
from benchmarks.steps import Precision, random_batch

Clock = Callable[[], float]


def set_precision(name: str) -> Precision:
    """Set what float32 products compute in, and return the precision of autocast. name: fp32, tf32, bf16, fp16."""
    set_tf32(name != "fp32")
    autocast: dict[str, Precision] = {"bf16": "bf16", "fp16": "fp16"}
    return autocast.get(name, "fp32")


def side_of(model: str, size: int | None) -> int:
    """Side of the input in pixels: the model's own where none is given."""
    return size or model_info(model).preprocess.size or 448


def make_batch(model: str, batch: int, side: int, device: torch.device) -> Batch:
    """Random samples."""
    return random_batch(batch, side, model_info(model).preprocess.max_tokens or 20, 500, device)


def build_supervised(model: str) -> Method:
    """A model with random weights and its own loss."""
    info = model_info(model)
    torch.manual_seed(0)
    return build_method("supervised", create_model(model), create_loss(info.loss, **info.loss_kwargs), None)


def build_training_optimizer(method: Method) -> Optimizer:
    """The trainer's AdamW."""
    o = OptimConfig()
    groups = method.param_groups(1e-6, o.weight_decay)
    return build_optimizer(groups, "adamw", lr=1e-6, betas=o.betas, eps=o.eps, amsgrad=False)


def clock_of(device: torch.device) -> Clock:
    """A clock that waits until the device has finished."""

    def clock() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    return clock


def seconds_of(action: Callable[[], object], clock: Clock) -> float:
    start = clock()
    action()
    return clock() - start


def free(device: torch.device) -> None:
    """Give back what an earlier measurement held."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


@contextmanager
def peak_memory(device: torch.device) -> Iterator[list[int | None]]:
    """Yield a list that holds the bytes at the peak of the block after it; None where this system does not tell."""
    peak: list[int | None] = [None]
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    yield peak
    if device.type == "cuda":
        peak[0] = torch.cuda.max_memory_allocated(device)
    elif Path("/proc/self/status").is_file():
        peak[0] = int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024
