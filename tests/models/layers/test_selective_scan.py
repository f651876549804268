"""The selective scan against recorded tensors, a plain loop, and the choice of the compiled kernel."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from amltrain.models.layers import hub_kernels
from amltrain.models.layers import selective_scan as scans
from amltrain.models.layers.selective_scan import SelectiveScan, recur, selective_scan


@pytest.mark.parametrize("case", ["n1", "n3"])
def test_recurrence_and_gradients_are_the_recorded_ones(shared_dir: Path, case: str) -> None:
    recorded = load_file(shared_dir / "goldens/remamber/scan.safetensors")
    names = ["u", "delta", "A", "B", "C", "D", "bias"]
    inputs = [recorded[f"{case}.input.{name}"].requires_grad_() for name in names]
    y = selective_scan(*inputs)
    torch.testing.assert_close(y, recorded[f"{case}.output.y"], rtol=0, atol=1e-5)
    (y * recorded[f"{case}.weight"]).sum().backward()
    for name, tensor in zip(names, inputs, strict=True):
        expected = recorded[f"{case}.grad.{name}"]
        torch.testing.assert_close(tensor.grad, expected, rtol=0, atol=1e-5 * expected.abs().max().item())


def test_orders_and_merges_are_the_recorded_ones(shared_dir: Path) -> None:
    recorded = load_file(shared_dir / "goldens/remamber/scan.safetensors")
    cells = torch.arange(12)[None, None]
    assert torch.equal(scans.map_orders(cells.unflatten(2, (3, 4)))[0, :, 0], recorded["order.scan2d"])
    assert torch.equal(scans.sequence_orders(cells)[0, :, 0], recorded["order.scan1d"])
    merged = recorded["order.merge_in"]
    torch.testing.assert_close(scans.merge_map(merged, 3, 4), recorded["order.merge2d"])
    torch.testing.assert_close(scans.merge_sequence(merged), recorded["order.merge1d"])


@pytest.mark.parametrize("length", [1, 16, 17, 300])
def test_chunks_are_the_plain_loop(length: int) -> None:
    torch.manual_seed(0)
    a, x = torch.rand(2, 3, length, dtype=torch.double), torch.randn(2, 3, length, dtype=torch.double)
    state, states = torch.zeros(2, 3, dtype=torch.double), []
    for t in range(length):
        state = a[..., t] * state + x[..., t]
        states.append(state)
    torch.testing.assert_close(recur(a, x), torch.stack(states, dim=-1))


def test_gradient_of_the_recurrence() -> None:
    torch.manual_seed(0)
    a = torch.rand(2, 20, dtype=torch.double, requires_grad=True)
    x = torch.randn(2, 20, dtype=torch.double, requires_grad=True)
    torch.library.opcheck(scans.linear_recurrence, (a, x), test_utils=("test_schema", "test_faketensor"))
    assert torch.autograd.gradcheck(scans.linear_recurrence, (a, x))


def test_the_compiled_kernel_is_for_cuda_only() -> None:
    assert scans.choose_scan(torch.device("cpu")) is selective_scan
    assert SelectiveScan(8, 8)(torch.randn(1, 3, 4, 8)).shape == (1, 3, 4, 8)


def selective_scan_fn(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None, z: Tensor | None = None,
    delta_bias: Tensor | None = None, delta_softplus: bool = False, return_last_state: bool = False,
) -> Tensor:  # fmt: skip
    """mamba_ssm's function by its arguments' names, computed step by step."""
    assert D is not None and delta_bias is not None and delta_softplus and z is None and not return_last_state
    step = torch.nn.functional.softplus(delta + delta_bias[:, None])
    b, c = (part.repeat_interleave(u.shape[1] // part.shape[1], dim=1) for part in (B, C))
    state, out = torch.zeros(*u.shape[:2], A.shape[1]), []
    for t in range(u.shape[-1]):
        state = (step[..., t, None] * A).exp() * state + (step[..., t] * u[..., t])[..., None] * b[..., t]
        out.append((state * c[..., t]).sum(-1) + D * u[..., t])
    return torch.stack(out, dim=-1)


def test_a_kernel_is_used_only_if_it_is_equal() -> None:
    cpu = torch.device("cpu")
    assert scans.largest_difference(scans.scan_of(selective_scan_fn), selective_scan, cpu) < 1e-4

    def wrong(*args: Tensor, **kwargs: Any) -> Tensor:
        return 1.01 * selective_scan_fn(*args, **kwargs)

    assert scans.largest_difference(scans.scan_of(wrong), selective_scan, cpu) > hub_kernels.TOLERANCE


def test_without_a_kernel_the_plain_computation_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(hub_kernels.ASKED, raising=False)
    assert scans.find_kernel.__wrapped__(torch.device("cuda")) is None  # nothing is tried where nobody asked
    monkeypatch.setenv(hub_kernels.ASKED, "1")
    monkeypatch.setitem(sys.modules, "kernels", None)
    with pytest.warns(UserWarning, match="mamba_ssm is not used"):
        assert scans.find_kernel.__wrapped__(torch.device("cuda")) is None
