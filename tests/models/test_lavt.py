"""LAVT at full size against the official code's key list and counts, and what AML is given to score."""

import json
from pathlib import Path

import pytest
import torch

from amltrain.models import check_param_groups, create_model
from amltrain.models.backbones.swin import LanguageGate
from amltrain.records import Batch

LAST_GATE = 2 * 1024 * 1024  # of the official code, which never uses it


@pytest.fixture(scope="module")
def full() -> torch.nn.Module:
    with torch.device("meta"):
        return create_model("lavt_swin_base")


@pytest.fixture
def batch() -> Batch:
    torch.manual_seed(1)
    return Batch(
        image=torch.randn(2, 3, 64, 96),
        input_ids=torch.randint(1, 512, (2, 6)),
        text_mask=torch.tensor([[True] * 6, [True] * 4 + [False] * 2]),
        target=torch.zeros(2, 64, 96, dtype=torch.uint8),
        no_target=torch.zeros(2, dtype=torch.bool),
        sample_id=torch.arange(2),
        random_key=torch.arange(2),
        geometry=torch.zeros(2, 6, dtype=torch.float64),
    )


def build(**kwargs) -> torch.nn.Module:
    """A tiny LAVT with wide open gates, in which words reach everything that they can reach."""
    torch.manual_seed(0)
    model = create_model("lavt_tiny", **kwargs).eval()
    for gate in model.modules():
        if isinstance(gate, LanguageGate):
            torch.nn.init.normal_(gate.reduce.weight, std=0.5)
            torch.nn.init.normal_(gate.expand.weight, std=0.5)
    return model


def test_parameter_count(full) -> None:
    assert sum(p.numel() for p in full.backbone.parameters()) == 98_196_856 - LAST_GATE
    assert sum(p.numel() for p in full.decoder.parameters()) == 20_651_010
    assert sum(p.numel() for p in full.text_encoder.parameters()) == 108_891_648
    assert sum(p.numel() for p in full.parameters()) == 227_739_514 - LAST_GATE


def test_every_official_key_is_mapped(full, shared_dir: Path) -> None:
    keys = json.loads((shared_dir / "goldens/lavt/full_keys.json").read_text())["keys"]
    official = {key: torch.empty(shape, device="meta") for key, (shape, _) in keys.items()}
    conversion = full.convert_state_dict(official)
    assert conversion.unmatched == []
    assert conversion.missing == []
    assert len(conversion.renamed) + len(conversion.dropped) == len(keys) == 648
    own = full.state_dict()
    assert {k: v.shape for k, v in conversion.state_dict.items()} == {k: v.shape for k, v in own.items()}
    assert sum(key.endswith("relative_position_index") for key in conversion.dropped) == 24
    assert sum("res_gate" in key for key in conversion.dropped) == 2
    assert len(conversion.dropped) == 26


def test_param_groups_are_the_releases(full) -> None:
    groups = {group["name"]: group for group in full.param_groups(lr=5e-5, weight_decay=0.01)}
    check_param_groups(full, groups.values())
    assert {group["lr"] for group in groups.values()} == {5e-5}
    assert {name: group["weight_decay"] for name, group in groups.items()} == {
        "backbone_no_decay": 0.0,
        "backbone": 0.01,
        "decoder": 0.01,
        "text_encoder": 0.01,
    }
    layers_0_to_9 = list(full.text_encoder.encoder.layer[:10].parameters())
    assert {id(p) for p in groups["text_encoder"]["params"]} == {id(p) for p in layers_0_to_9}
    frozen = {name for name, p in full.named_parameters() if not p.requires_grad}
    kept = ("text_encoder.embeddings.", "text_encoder.encoder.layer.10.", "text_encoder.encoder.layer.11.")
    assert frozen == {name for name, _ in full.named_parameters() if name.startswith(kept)}
    tables = [p for n, p in full.named_parameters() if n.endswith("relative_position_bias_table")]
    assert len(tables) == 24
    assert {id(p) for p in tables} <= {id(p) for p in groups["backbone_no_decay"]["params"]}


def test_aml_scores_the_image_without_words(batch) -> None:
    model = build()
    one = model.alignment_features(batch)
    other = model.alignment_features(batch._replace(input_ids=batch.input_ids.flip(0)))
    assert one.visual.shape == (2, model.alignment_dims[0], 2, 3)
    assert one.text.shape == (2, 6, model.alignment_dims[1])
    torch.testing.assert_close(one.visual, other.visual, rtol=0, atol=0)
    assert not torch.allclose(one.text, other.text)


def test_conditioned_features_are_those_of_the_network(batch) -> None:
    model = build()
    seen = []
    model.backbone.swin.layers[3].register_forward_hook(lambda module, args, output: seen.append(output))
    model(batch)
    features = model.alignment_features(batch, visual="conditioned")
    torch.testing.assert_close(features.visual, seen[0].permute(0, 3, 1, 2))
    other = model.alignment_features(batch._replace(input_ids=batch.input_ids.flip(0)), visual="conditioned")
    assert not torch.allclose(features.visual, other.visual)


def test_padded_tokens_do_not_matter(batch) -> None:
    model = build()
    padded = batch._replace(input_ids=batch.input_ids.masked_fill(~batch.text_mask, 7))
    torch.testing.assert_close(model(batch).logits, model(padded).logits)


def test_text_features_can_be_kept_for_another_image(batch) -> None:
    model = build()
    features = model.encode(batch._replace(image=torch.zeros_like(batch.image)))
    again = model.reencode_image(batch, features)
    torch.testing.assert_close(model.decode(again, batch).logits, model(batch).logits)


def test_heads_of_the_fusion_stage_by_stage() -> None:
    with torch.device("meta"):
        model = create_model("lavt_swin_base", fusion_heads=[1, 2, 4, 8])
    assert [fusion.heads for fusion in model.backbone.fusion] == [1, 2, 4, 8]
