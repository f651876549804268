"""Pixel-word attention against the equations written out, and what it must not read."""

import pytest
import torch
from torch import nn

from amltrain.models.layers.pwam import LanguageGate, PixelWordAttention


@pytest.fixture
def inputs():
    torch.manual_seed(0)
    mask = torch.tensor([[True, True, True, True], [True, True, False, False]])
    return torch.randn(2, 9, 8), torch.randn(2, 4, 6), mask


def written_out(layer: PixelWordAttention, x, text, mask, heads: int):
    """LAVT's equations with convolutions' layout [B, C, N] and explicit softmax, in float64."""

    def normalised(m):  # over positions
        return (m - m.mean(-1, keepdim=True)) / (m.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()

    def apply(linear: nn.Linear, m):
        return torch.einsum("oi,bin->bon", linear.weight, m) + linear.bias[:, None]

    x, text, keep = x.transpose(1, 2), text.transpose(1, 2), mask[:, None].to(x.dtype)
    channels = x.shape[1]
    query = normalised(apply(layer.query, x)).unflatten(1, (heads, -1))
    key = (apply(layer.key, text) * keep).unflatten(1, (heads, -1))
    value = (apply(layer.value, text) * keep).unflatten(1, (heads, -1))
    scores = torch.einsum("bhcn,bhcl->bhnl", query, key) / channels**0.5 + 1e4 * (keep[:, None] - 1)
    words = torch.einsum("bhnl,bhcl->bhcn", scores.softmax(-1), value).flatten(1, 2)
    fused = nn.functional.gelu(apply(layer.visual, x)) * normalised(apply(layer.output, words))
    return nn.functional.gelu(apply(layer.project, fused)).transpose(1, 2)


@pytest.mark.parametrize("heads", [1, 4])
def test_equations(inputs, heads):
    x, text, mask = inputs
    layer = PixelWordAttention(8, 6, heads=heads).double()
    x, text = x.double(), text.double()
    torch.testing.assert_close(layer(x, text, mask), written_out(layer, x, text, mask, heads), rtol=1e-9, atol=1e-9)


def test_padded_tokens_are_not_read(inputs):
    x, text, mask = inputs
    layer = PixelWordAttention(8, 6)
    before = layer(x, text, mask)
    text = torch.where(mask[..., None], text, 1000.0)
    torch.testing.assert_close(layer(x, text, mask), before, rtol=0, atol=0)


def test_a_sentence_without_tokens_is_finite(inputs):
    x, text, mask = inputs
    assert PixelWordAttention(8, 6)(x, text, torch.zeros_like(mask)).isfinite().all()


def test_a_closed_gate_leaves_the_trunk_alone(inputs):
    gate = LanguageGate(8, std=0.0)
    assert torch.equal(gate(inputs[0], torch.randn(2, 9, 8)), inputs[0])
