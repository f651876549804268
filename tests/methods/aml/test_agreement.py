"""Agreement of masks from two sizes of stage 1."""

import torch

from amltrain.methods.aml.agreement import stage1_agreement
from amltrain.models import create_model
from tests.methods.aml.test_method import make_batch


def test_the_same_size_agrees_wholly_and_another_in_part() -> None:
    torch.manual_seed(0)
    model = create_model("caris_tiny")
    batches = [make_batch(size=(128, 128), seed=seed) for seed in range(2)]
    same = stage1_agreement(model, batches, 128)
    assert (same.blocks, same.iou) == (1.0, 1.0)
    assert same.masked_full == same.masked_small > 0
    assert same.correlation > 0.999
    other = stage1_agreement(model, batches, 64)
    assert 0 < other.blocks < 1
    assert other.iou < 1
    assert -1 <= other.correlation < 0.999
