"""The selective scan against recorded tensors, a plain loop, and the choice of the compiled kernel."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

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
    """Without a GPU the kernel itself cannot run; a CPU tensor must not reach it."""

    def kernel(*inputs: Tensor) -> Tensor:
        raise AssertionError("a CPU tensor reached the CUDA kernel")

    operator = SelectiveScan(8, 8)
    assert operator.kernel is None
    operator.kernel = kernel
    assert operator(torch.randn(1, 3, 4, 8)).shape == (1, 3, 4, 8)
