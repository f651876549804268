"""Measure training steps on the null GPU; run by `NullGPU.run` in a process of its own, never imported.

    steps.py OUT.json tiny supervised aml      every tiny model with these methods
    steps.py OUT.json full MODEL ...           full-size models, supervised, at batch 2

OUT.json: model -> method -> measurement (`Measurement`). A step that raises is a result: its `error` names the place.
"""

import ctypes
import gc
import json
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

import amltrain
from amltrain.losses import create_loss
from amltrain.methods.base import Method, build_method
from amltrain.models import RISModel, create_model, model_info
from amltrain.records import Batch, Vocabulary
from amltrain.registry import METHODS
from amltrain.training.optim import average_weights, build_optimizer
from tests.models.test_registry import TINY, VOCABULARY, build, make_batch

DEVICE = torch.device("cuda:0")
OPTIONS = {"supervised": {}, "aml": {"preset": "paper", "temperature": 0.05}}
"""The temperature is given, since it would be solved from the values of scores, which a null GPU does not compute."""
PACKAGE = Path(amltrain.__file__).parent
MIB = 2**20


@dataclass
class Measurement:
    """One training step, the second one, whose optimizer state exists.

    kernels              launched by forward, backward, clipping and optimizer
    casts                tensors converted to another floating type, by forward and backward
    float32              share of the FLOPs of matrix products and convolutions that are not in bf16, 0..1
    peak                 MiB of device memory at most, that of model, gradients and optimizer included
    without_gradient     trained parameters that backward did not reach
    error                what the step raised, with the place; "" = nothing
    """

    kernels: int = 0
    casts: int = 0
    float32: float = 0.0
    peak: float = 0.0
    without_gradient: list[str] = field(default_factory=list)
    error: str = ""


class Counter(TorchDispatchMode):
    """Counts casts between floating types, and FLOPs by type."""

    def __init__(self) -> None:
        super().__init__()
        self.casts = 0
        self.flops = {"float32": 0, "bfloat16": 0}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func is torch.ops.aten._to_copy.default:
            self.casts += args[0].is_floating_point() and out.is_floating_point() and args[0].dtype != out.dtype
        elif (formula := flop_registry.get(func.overloadpacket)) is not None:
            made = next(tensor for tensor in (out if isinstance(out, tuple) else (out,)) if tensor is not None)
            kind = "bfloat16" if made.dtype == torch.bfloat16 else "float32"
            self.flops[kind] += formula(*args, **kwargs, out_val=out)
        return out

    @property
    def float32(self) -> float:
        return self.flops["float32"] / max(1, sum(self.flops.values()))


@contextmanager
def no_synchronisation() -> Iterator[None]:
    """Raise RuntimeError where the host waits for the device."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def launched() -> int:
    """Kernels and matrix products so far, counted by the library."""
    return int(LIBRARY.fakecuda_launches())


def make_method(name: str, model: RISModel, loss: torch.nn.Module, vocabulary: int) -> Method:
    """The method on the device, in training mode."""
    options = METHODS.options(name)(**OPTIONS[name])
    words = Vocabulary(vocabulary, 0, 3, (0, 1, 2, 3, 4))
    return build_method(name, model, loss, options, words).to(DEVICE).train()


def loss_of(method: Method, batch: Batch) -> torch.Tensor:
    with torch.autocast("cuda", torch.bfloat16):
        return method(batch)["loss"]


def take_steps(method: Method, batch: Batch, result: Measurement) -> None:
    """Two training steps as the trainer takes them, none of which waits for the device, then a counted one.

    Casts are counted apart: torch takes other paths under a dispatch mode, some of which avoid a synchronisation.
    """
    groups = method.param_groups(1e-4, 0.01)
    optimizer = build_optimizer(groups, "adamw", lr=1e-4, betas=(0.9, 0.999), eps=1e-8, amsgrad=False)
    assert optimizer.defaults["fused"], "the optimizer is not the fused one"
    for step in range(2):
        torch.cuda.reset_peak_memory_stats()
        before = launched()
        with no_synchronisation():
            method.before_step(step, [batch])
            loss_of(method, batch).backward()
            result.without_gradient = [n for n, p in method.named_parameters() if p.requires_grad and p.grad is None]
            torch.nn.utils.clip_grad_norm_(method.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        result.kernels = launched() - before
    result.peak = round(torch.cuda.max_memory_allocated() / MIB, 1)
    with Counter() as counter:
        loss_of(method, batch).backward()
    result.casts, result.float32 = counter.casts, round(counter.float32, 3)


def follow(model: RISModel) -> None:
    """Update an average of the model's weights twice: the first update copies, the second averages."""
    average = average_weights(model, 0.999)
    with no_synchronisation():
        average.update_parameters(model)
        average.update_parameters(model)


def evaluate(model: RISModel, batch: Batch) -> None:
    """Run the model as the evaluator does."""
    model.eval()
    with no_synchronisation(), torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
        model(batch)


def place_of(error: BaseException) -> str:
    """The innermost lines of the package, behind the line that raised."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if Path(frame.filename).is_relative_to(PACKAGE)]
    places = [f"{Path(frame.filename).relative_to(PACKAGE.parent)}:{frame.lineno}" for frame in reversed(ours[-3:])]
    return " < ".join([f"{Path(frames[-1].filename).name}:{frames[-1].lineno}", *places])


def measure(name: str, method_name: str, model: RISModel, batch: Batch, tiny: bool = True) -> Measurement:
    """Steps of one model and one method; for a tiny model also the average of its weights and an evaluation."""
    result, info = Measurement(), model_info(name)
    try:
        method = make_method(method_name, model, create_loss(info.loss, **info.loss_kwargs), VOCABULARY)
        batch = batch.mapped(lambda tensor: tensor.to(DEVICE))
        take_steps(method, batch, result)
        if tiny and method_name == "supervised":
            follow(method.model)
            evaluate(method.model, batch)
    except Exception as error:
        result.error = f"{type(error).__name__}: {str(error).splitlines()[0][:300]} (at {place_of(error)})"
    gc.collect()
    torch.cuda.empty_cache()
    return result


def full_size(name: str) -> RISModel:
    """A full-size model built on the device, whose memory nothing touches."""
    with DEVICE:
        return create_model(name)


def tiny_measurements(methods: list[str]) -> dict[str, dict[str, Measurement]]:
    """Every tiny model with every method, at 96 x 96 pixels and batch 2, dropout on."""
    return {
        name: {method: measure(name, method, build(name, dropout=0.1), make_batch(name, 96, 96)) for method in methods}
        for name in TINY
    }


def full_measurements(names: list[str]) -> dict[str, dict[str, Measurement]]:
    """Full-size models without AML, at batch 2 and the size that their protocol sets."""
    results = {}
    for name in names:
        size = model_info(name).preprocess.size
        model, batch = full_size(name), make_batch(name, size, size)
        results[name] = {"supervised": measure(name, "supervised", model, batch, tiny=False)}
    return results


FAULTS: dict[str, Callable[[torch.Tensor], Any]] = {
    "value read": lambda x: x.sum().item(),
    "copy from the host": lambda x: x + torch.ones(4).to(DEVICE),
    "mask as index": lambda x: x[x > 0],
    "wrong device": lambda x: x + torch.ones(4),
    "nothing": lambda x: (x * 2).sum().backward(),
}


def faults_seen() -> dict[str, str]:
    """What each fault raises here; "" = nothing."""
    seen = {}
    for name, fault in FAULTS.items():
        values = torch.ones(4, device=DEVICE, requires_grad=True)
        try:
            with no_synchronisation():
                fault(values)
            seen[name] = ""
        except RuntimeError as error:
            seen[name] = str(error)
    return seen


def main(output: str, kind: str, *names: str) -> None:
    """Write the measurements."""
    assert torch.cuda.get_device_name() == "Null GPU", "this is a real GPU; start through NullGPU.run"
    measured = {"tiny": tiny_measurements, "full": full_measurements}[kind](list(names))
    plain = {name: {method: asdict(result) for method, result in row.items()} for name, row in measured.items()}
    written = {"torch": torch.__version__, "faults": faults_seen(), "measured": plain}
    Path(output).write_text(json.dumps(written, indent=1))


if __name__ == "__main__":
    LIBRARY = ctypes.CDLL(os.environ["LD_PRELOAD"])
    LIBRARY.fakecuda_launches.restype = ctypes.c_long
    main(*sys.argv[1:])
    os._exit(0)  # the interpreter's own end can abort: threads of CUDA libraries wait for a driver that is not there
