"""Sampling level by level gives what transformers' function gives, gradients included; so must a CUDA kernel.

The kernel itself needs a GPU and the Hub. Its arguments and results are checked here with operators of the same
signature that compute by transformers' function.
"""

import sys
import warnings
from typing import Any

import pytest
import torch
from transformers.models.mask2former.modeling_mask2former import multi_scale_deformable_attention

from amltrain.models.layers import hub_kernels
from amltrain.models.layers.deformable import choose_sampling, find_kernel, largest_difference, sample_levels, sampler


def test_sampling_level_by_level_equals_transformers() -> None:
    torch.manual_seed(0)
    shapes = [(2, 3), (4, 5), (7, 9)]
    count = sum(h * w for h, w in shapes)
    inputs = (
        torch.randn(2, count, 4, 6, requires_grad=True),
        (1.4 * torch.rand(2, 11, 4, 3, 5, 2) - 0.2).requires_grad_(),  # some of them outside of the map
        torch.rand(2, 11, 4, 3, 5, requires_grad=True),
    )
    results = []
    for function in (sample_levels, multi_scale_deformable_attention):
        output = function(inputs[0], shapes, *inputs[1:])
        results.append((output, *torch.autograd.grad(output.square().sum(), inputs)))
    for given, expected in zip(*results, strict=True):
        torch.testing.assert_close(given, expected, rtol=1e-5, atol=1e-5)


class Operators:
    """Deformable DETR's two operators."""

    def __init__(self, factor: float = 1.0) -> None:
        self.factor = factor

    def ms_deform_attn_forward(
        self, values: Any, sizes: Any, starts: Any, places: Any, weights: Any, images_at_once: int
    ) -> Any:
        assert all(part.is_contiguous() for part in (values, sizes, starts, places, weights))
        assert values.shape[0] % images_at_once == 0
        assert starts.tolist() == [0, *sizes.prod(1).cumsum(0)[:-1].tolist()]
        return self.factor * multi_scale_deformable_attention(values, sizes.tolist(), places, weights)

    def ms_deform_attn_backward(
        self, values: Any, sizes: Any, starts: Any, places: Any, weights: Any, gradient: Any, images_at_once: int
    ) -> list[Any]:
        inputs = [part.detach().requires_grad_() for part in (values, places, weights)]
        with torch.enable_grad():
            output = multi_scale_deformable_attention(inputs[0], sizes.tolist(), *inputs[1:])
        return list(torch.autograd.grad(output, inputs, gradient))


def test_a_kernel_is_used_only_if_it_is_equal() -> None:
    cpu = torch.device("cpu")
    assert largest_difference(sampler(Operators()), sample_levels, cpu) < 1e-5
    assert largest_difference(sampler(Operators(1.01)), sample_levels, cpu) > hub_kernels.TOLERANCE


def test_without_a_kernel_the_plain_computation_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose_sampling(torch.device("cpu")) is sample_levels
    monkeypatch.setitem(sys.modules, "kernels", None)
    monkeypatch.delenv(hub_kernels.ASKED, raising=False)
    with warnings.catch_warnings():  # nothing is tried where nobody asked
        warnings.simplefilter("error")
        assert find_kernel.__wrapped__(torch.device("cuda"), sample_levels) is None
    monkeypatch.setenv(hub_kernels.ASKED, "1")
    with pytest.warns(UserWarning, match="deformable-detr is not used"):
        assert find_kernel.__wrapped__(torch.device("cuda"), sample_levels) is None
