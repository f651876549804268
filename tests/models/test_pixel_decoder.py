"""The pixel decoder and its parts against transformers' Mask2Former, which is the same function."""

import pytest
import torch
from transformers import Mask2FormerConfig
from transformers.models.mask2former.modeling_mask2former import Mask2FormerPixelDecoder

from amltrain.models.layers.basic import cell_centres
from amltrain.models.layers.deformable import MultiScaleDeformableAttention, PixelDecoder

RENAMED = [
    ("input_projections", "input_proj"),
    ("encoder.layers", "layers"),
    ("self_attn_layer_norm", "norm1"),
    ("final_layer_norm", "norm2"),
    ("fc1", "linear1"),
    ("fc2", "linear2"),
    ("adapter_1", "lateral"),
    ("layer_1", "merge"),
    ("mask_projection", "mask_features"),
]


def test_same_function_as_mask2former():
    torch.manual_seed(0)
    config = Mask2FormerConfig(
        feature_size=64,
        mask_feature_size=48,
        encoder_layers=2,
        encoder_feedforward_dim=96,
        num_attention_heads=4,
        dropout=0.0,
        common_stride=4,
    )
    theirs = Mask2FormerPixelDecoder(config, [8, 12, 16, 20])
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    state = theirs.state_dict()
    for old, new in RENAMED:
        state = {key.replace(old, new): value for key, value in state.items()}
    ours = PixelDecoder([8, 12, 16, 20], dim=64, mask_dim=48, layers=2, heads=4, feedforward=96)
    ours.load_state_dict(state)
    maps = [torch.randn(2, c, s, s + 1) for c, s in ((8, 24), (12, 12), (16, 6), (20, 3))]
    expected = theirs(maps, output_attentions=False, output_hidden_states=False, return_dict=True)
    mask_features, scales = ours(maps)
    torch.testing.assert_close(mask_features, expected.mask_features, rtol=1e-4, atol=2e-5)
    for scale, other in zip(scales, expected.multi_scale_features, strict=True):
        torch.testing.assert_close(scale, other, rtol=1e-4, atol=2e-5)


def test_a_fresh_layer_reads_in_eight_directions():
    layer = MultiScaleDeformableAttention(16, heads=8, levels=1, points=2)
    first, _, third = layer.sampling_offsets.bias.view(8, 2, 2)[:3].unbind(0)
    torch.testing.assert_close(first, torch.tensor([[1.0, 0.0], [2.0, 0.0]]), atol=1e-6, rtol=0)
    torch.testing.assert_close(third, torch.tensor([[0.0, 1.0], [0.0, 2.0]]), atol=1e-6, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_places_are_computed_in_full_precision(dtype):
    torch.manual_seed(0)
    layer = MultiScaleDeformableAttention(16, heads=4, levels=2)
    x, reference = torch.randn(1, 20, 16), torch.cat([cell_centres(4, 4), cell_centres(2, 2)])
    plain = layer(x, x, reference, [(4, 4), (2, 2)])
    with torch.autocast("cpu", dtype=dtype):
        assert torch.equal(layer(x, x, reference, [(4, 4), (2, 2)]), plain)
