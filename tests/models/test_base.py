"""Renaming official keys: everything is renamed, dropped with a reason, or reported."""

import pytest
import torch

from amltrain.errors import UserError
from amltrain.models.base import convert

OWN = {"body.linear.weight": torch.zeros(2, 3), "body.linear.bias": torch.zeros(2), "scale": torch.zeros(())}
RENAMES = [(r"^trunk\.", "body."), (r"\.conv\.", ".linear.")]


def test_every_official_key_is_accounted_for():
    official = {
        "trunk.conv.weight": torch.ones(2, 3, 1, 1),
        "trunk.conv.bias": torch.ones(2),
        "trunk.index": torch.ones(5),
        "head.weight": torch.ones(1),
    }
    result = convert(official, OWN, renames=RENAMES, drops=[(r"trunk\.index", "recomputed")])
    assert result.renamed == {"trunk.conv.weight": "body.linear.weight", "trunk.conv.bias": "body.linear.bias"}
    assert result.state_dict["body.linear.weight"].shape == (2, 3)
    assert result.dropped == {"trunk.index": "recomputed"}
    assert result.unmatched == ["head.weight"]
    assert result.missing == ["scale"]


def test_a_wrong_shape_is_rejected_by_both_names():
    with pytest.raises(
        UserError, match=r"trunk\.conv\.weight has shape \[2, 4, 1, 1\], this model's body\.linear\.weight"
    ):
        convert({"trunk.conv.weight": torch.ones(2, 4, 1, 1)}, OWN, renames=RENAMES)
