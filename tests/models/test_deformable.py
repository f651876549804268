"""Sampling level by level gives what transformers' function gives, gradients included."""

import torch
from transformers.models.mask2former.modeling_mask2former import multi_scale_deformable_attention

from amltrain.models.layers.deformable import sample_levels


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
