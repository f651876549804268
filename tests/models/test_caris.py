"""CARIS at full size against the official code's keys, groups and counts (shapes only: nothing is allocated)."""

import json
from pathlib import Path

import pytest
import torch

from amltrain.models import check_param_groups, create_model


@pytest.fixture(scope="module")
def full() -> torch.nn.Module:
    with torch.device("meta"):
        return create_model("caris_swin_base")


def test_parameter_count(full) -> None:
    assert sum(p.numel() for p in full.parameters()) == 226_572_664
    assert sum(p.numel() for p in full.vision.parameters()) == 86_745_016
    assert sum(p.numel() for p in full.text.parameters()) == 108_891_648
    assert sum(p.numel() for p in full.prompts.parameters()) == 2_760_960
    assert sum(p.numel() for p in full.decoder.parameters()) == 28_175_040


@pytest.mark.parametrize("release", ["caris", "amlris_release"])
def test_every_official_key_is_mapped(full, shared_dir: Path, release: str) -> None:
    keys = json.loads((shared_dir / "goldens" / release / "full_keys.json").read_text())["keys"]
    official = {key: torch.empty(shape, device="meta") for key, (shape, _) in keys.items()}
    conversion = full.convert_state_dict(official)
    assert conversion.unmatched == []
    assert conversion.missing == []
    assert len(conversion.renamed) + len(conversion.dropped) == len(keys)
    own = full.state_dict()
    assert {k: v.shape for k, v in conversion.state_dict.items()} == {k: v.shape for k, v in own.items()}


def test_an_unknown_key_is_reported(full) -> None:
    conversion = full.convert_state_dict({"backbone.vis_encoder.surprise": torch.empty(1)})
    assert conversion.unmatched == ["backbone.vis_encoder.surprise"]
    assert len(conversion.missing) == len(full.state_dict())


def test_param_groups_are_the_releases(full, shared_dir: Path) -> None:
    recorded = json.loads((shared_dir / "goldens/caris/full_optim_groups.json").read_text())
    keys = json.loads((shared_dir / "goldens/caris/full_keys.json").read_text())["keys"]
    tensors = {key: torch.empty(shape, device="meta") for key, (shape, _) in keys.items()}
    official = {ours: key for key, ours in full.convert_state_dict(tensors).renamed.items()}
    names = {id(p): official[name] for name, p in full.named_parameters()}
    groups = full.param_groups(lr=1e-4, weight_decay=0.01)
    check_param_groups(full, groups)

    def described(name: str, lr: float, decays: bool, members: set[str]) -> tuple:
        return round(lr, 9), decays, frozenset(members)

    ours = {described(g["name"], g["lr"], g["weight_decay"] > 0, {names[id(p)] for p in g["params"]}) for g in groups}
    theirs = {
        described(g["group"], 1e-4 * g["lr_scale"], "no_decay" not in g["group"], set(g["names"])) for g in recorded
    }
    assert ours == theirs


def test_suppressed_positions_change_the_answer_but_never_break_it() -> None:
    from amltrain.models.layers.fusion_decoder import visible_positions

    suppressed = torch.zeros(2, 2, 2, dtype=torch.bool)
    suppressed[0, 0, 0] = True
    suppressed[1] = True
    visible = visible_positions(suppressed, [(2, 2), (4, 4)])
    assert visible.shape == (2, 1, 1, 20)
    assert visible[0].flatten().tolist() == [False, True, True, True] + [
        not (row < 2 and column < 2) for row in range(4) for column in range(4)
    ]
    assert bool(visible[1].all())  # nothing would be left to read
