"""A training step of any model, with AML or without, never makes the host wait for the device.

A GPU shows waiting as lost time only, so what would wait is caught by name on a CPU: reading a tensor's value, results
whose size depends on values, and tensors made of Python numbers, which are copied to the device.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from amltrain.losses import create_loss
from amltrain.methods.aml.options import AMLOptions
from amltrain.methods.base import build_method
from amltrain.models import model_info
from amltrain.training import optim
from tests.models.test_registry import TINY, build, make_batch

COPIES = ("tensor", "as_tensor", "new_tensor", "from_numpy", "asarray")
READS = ("item", "tolist", "numpy", "cpu", "__bool__", "__int__", "__float__", "__index__", "nonzero", "unique")
KERNELS = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "equal", "repeat_interleave.Tensor")


class Calls(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        assert name not in COPIES + READS, f"{name} waits for the device"
        return func(*args, **(kwargs or {}))


class Kernels(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func).removeprefix("aten.")
        assert not name.startswith(KERNELS), f"{name} waits for the device"
        if name.startswith("index"):  # a mask as an index is counted first
            indices = [i for arg in args if isinstance(arg, list | tuple) for i in arg if i is not None]
            assert all(i.dtype != torch.bool for i in indices), f"{name} with a mask waits for the device"
        return func(*args, **(kwargs or {}))


@contextmanager
def no_waiting() -> Iterator[None]:
    with Calls(), Kernels():
        yield


WAITING = {
    "item": lambda x: x.sum().item(),
    "float": lambda x: float(x.sum()),
    "if": lambda x: 1 if x.any() else 0,
    "tolist": lambda x: x.tolist(),
    "cpu": lambda x: x.cpu(),
    "tensor": lambda x: x + torch.tensor([1.0, 2.0]),
    "new_tensor": lambda x: x + x.new_tensor(3.0),
    "mask as index": lambda x: x[x > 0],
    "assignment by mask": lambda x: x.__setitem__(x > 0, x[:1]),
    "nonzero": lambda x: (x > 0).nonzero(),
    "where": lambda x: torch.where(x > 0),
    "masked_select": lambda x: x.masked_select(x > 0),
}


@pytest.mark.parametrize("waits", WAITING.values(), ids=WAITING)
def test_what_waits_is_caught(waits: Any) -> None:
    with no_waiting(), pytest.raises(AssertionError, match="waits for the device"):
        waits(torch.randn(4))


OFF = {}
PAPER = {"preset": "paper", "temperature": 0.05, "diagnostics_every": 1}
RELEASED = {"preset": "released"}


@pytest.mark.parametrize("options", [OFF, PAPER, RELEASED], ids=["off", "paper", "released"])
@pytest.mark.parametrize("name", TINY)
def test_a_step_never_waits(name: str, options: dict) -> None:
    info, model = model_info(name), build(name, dropout=0.1).train()
    method, chosen = ("aml", AMLOptions(**options)) if options else ("supervised", None)
    task = build_method(method, model, create_loss(info.loss, **info.loss_kwargs), chosen)
    batch = make_batch(name, 96, 96)
    with no_waiting():
        loss = task(batch)["loss"]
        loss.backward()
    assert loss.isfinite()


@pytest.mark.parametrize("precision", [None, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
def test_clipping_and_the_fused_optimizer_never_wait(
    precision: torch.dtype | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the trainer does after the backward pass, with the kernel that a GPU gets."""
    monkeypatch.setattr(optim, "FUSED_DEVICES", {"cpu"})
    model = build("caris_tiny").train()
    groups = model.param_groups(lr=1e-3, weight_decay=0.01)
    optimizer = optim.build_optimizer(groups, "adamw", lr=1e-3, betas=(0.9, 0.999), eps=1e-8, amsgrad=False)
    assert optimizer.param_groups[0]["fused"]
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=precision == torch.float16)
    batch = make_batch("caris_tiny", 64, 64)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    for _ in range(2):  # the first step makes the optimizer's state
        with no_waiting():
            with torch.autocast("cpu", precision, enabled=precision is not None):
                loss = model(batch).logits.float().square().mean()
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
    assert norm.isfinite()
    assert any(not torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))
