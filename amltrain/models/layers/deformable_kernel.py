"""The CUDA kernel of deformable attention from the Hub, if `AMLTRAIN_HUB_KERNELS=1` asks for it.

`kernels-community/deformable-detr` (Apache 2.0) holds Deformable DETR's own operators, compiled. They are compared with
`sample_levels` on the first use on a device, gradients included; where they cannot be loaded or differ, the plain
computation stays and one warning says why. They are off by default because this downloads and runs native code.
The `kernels` package is needed.
"""

import os
import warnings
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from amltrain.errors import first_line

ASKED = "AMLTRAIN_HUB_KERNELS"
"""Environment variable that is 1 where the Hub's native code may be downloaded and run."""
REPOSITORY = "kernels-community/deformable-detr"
TOLERANCE = 1e-3
"""Largest difference from the plain computation, relative to the largest value: another order of float32 sums."""

Sample = Callable[[Tensor, list[tuple[int, int]], Tensor, Tensor], Tensor]
"""Arguments and result of `sample_levels`."""


@cache
def find_kernel(device: torch.device, plain: Sample) -> Sample | None:
    """Return the kernel for a CUDA device; None where it is not asked for, cannot be loaded or is not equal."""
    if device.type != "cuda" or os.environ.get(ASKED) != "1":
        return None
    try:
        from kernels import get_kernel

        sample = sampler(get_kernel(REPOSITORY))
        with torch.inference_mode(False), torch.enable_grad():  # the first use may be in an evaluation
            difference = largest_difference(sample, plain, device)
    except Exception as error:  # a download, a missing build or a launch: training must not depend on any of them
        warnings.warn(f"{REPOSITORY} is not used: {first_line(error)}", stacklevel=2)
        return None
    if not difference <= TOLERANCE:
        warnings.warn(f"{REPOSITORY} is not used: it differs by {difference:.1e}", stacklevel=2)
        return None
    return sample


def sampler(operators: Any) -> Sample:
    """Wrap the kernel's two operators. operators: with `ms_deform_attn_forward` and `ms_deform_attn_backward`."""

    class Operators(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, values: Tensor, sizes: Tensor, starts: Tensor, places: Tensor, weights: Tensor) -> Tensor:
            inputs = (values, sizes, starts, places, weights)
            ctx.save_for_backward(*inputs)
            return operators.ms_deform_attn_forward(*inputs, values.shape[0])

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
            inputs = ctx.saved_tensors
            batch = inputs[0].shape[0]
            found = operators.ms_deform_attn_backward(*inputs, gradients[0].contiguous(), batch)
            return found[0], None, None, found[1], found[2]

    def sample(values: Tensor, shapes: list[tuple[int, int]], places: Tensor, weights: Tensor) -> Tensor:
        sizes, starts = _layout(tuple(shapes), values.device)
        return Operators.apply(values.contiguous(), sizes, starts, places.contiguous(), weights.contiguous())

    return sample


def largest_difference(one: Sample, other: Sample, device: torch.device) -> float:
    """Largest relative difference of outputs and gradients on random inputs, some of which lie outside of the maps."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(5, 7), (3, 4), (2, 2)]
    count = sum(height * width for height, width in shapes)
    drawn = (
        torch.randn(2, count, 4, 32, generator=generator),
        1.4 * torch.rand(2, 9, 4, 3, 4, 2, generator=generator) - 0.2,
        torch.rand(2, 9, 4, 3, 4, generator=generator),
    )
    found = []
    for function in (one, other):
        values, places, weights = (part.to(device).requires_grad_() for part in drawn)
        output = function(values, shapes, places, weights)
        found.append((output.detach(), *torch.autograd.grad(output.square().sum(), (values, places, weights))))
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(*found, strict=True))


@cache
def _layout(shapes: tuple[tuple[int, int], ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """(h, w) of every level and where it starts, int64, on the device once for all steps."""
    before = [sum(h * w for h, w in shapes[:level]) for level in range(len(shapes))]
    with torch.inference_mode(False):
        return torch.tensor(shapes, device=device), torch.tensor(before, device=device)
