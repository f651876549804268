"""Swin with words: what the words reach and what they must not."""

import pytest
import torch

from amltrain.models.backbones.swin import LanguageSwin, Swin


def build(gate_std: float) -> LanguageSwin:
    torch.manual_seed(0)
    swin = Swin(embed_dim=8, depths=(1, 2, 1, 1), num_heads=(1, 1, 2, 2), window_size=3, drop_path_rate=0.0)
    return LanguageSwin(swin, text_dim=6, gate_std=gate_std).eval()


@pytest.fixture
def inputs():
    torch.manual_seed(1)
    return torch.randn(2, 3, 64, 96), torch.randn(2, 5, 6), torch.ones(2, 5, dtype=torch.bool)


def test_shapes(inputs):
    maps = build(0.02)(*inputs)
    assert [tuple(m.shape) for m in maps] == [(2, 8, 16, 24), (2, 16, 8, 12), (2, 32, 4, 6), (2, 64, 2, 3)]


@pytest.mark.parametrize(("gate_std", "reached"), [(0.0, False), (2.0, True)])
def test_words_reach_the_trunk_only_through_open_gates(inputs, gate_std, reached):
    image, text, mask = inputs
    model = build(gate_std)
    seen = []
    model.swin.layers[3].register_forward_hook(lambda module, args, output: seen.append(output))
    one, other = model(image, text, mask), model(image, text.flip(0), mask)
    unimodal = model.without_words(image).permute(0, 2, 3, 1)
    assert not torch.allclose(one[3], other[3])
    assert torch.equal(seen[0], seen[1]) != reached
    assert torch.equal(unimodal, seen[0]) != reached
