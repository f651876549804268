"""MagNet at full size against the official key list and counts, its two fusions of the words, and what AML scores."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from amltrain.models import check_param_groups, create_model
from amltrain.records import Batch
from tests.models.test_registry import make_batch
from tests.parity import compare
from tests.parity.magnet import ADAPTER

UNUSED = {
    "image_model.layers.3.res_gate": 2 * 1024**2,
    "image_model.norm": 2 * (128 + 256 + 512 + 1024),
    "language_model.pwams.3": 4 * (768**2 + 768) + 2 * (1024 * 768 + 768),
    "language_model.res_gates.3": 2 * 768**2,
    "language_model.norms": 4 * 2 * 768,
    "classifier.predictor.class_embed": 2 * 257,
    "lang_proj": 196_864,
}
"""Parameters of the official code that have no effect on the mask."""


@pytest.fixture(scope="module")
def full() -> nn.Module:
    with torch.device("meta"):
        return create_model("magnet_swin_base")


@pytest.fixture
def batch() -> Batch:
    return make_batch("magnet_tiny", 64, 96)


def build(**kwargs) -> nn.Module:
    """A tiny MagNet with wide open gates, in which words reach everything that they can reach."""
    torch.manual_seed(0)
    model = create_model("magnet_tiny", vocab_size=64, **kwargs).eval()
    for gate in [*model.image_gates, *model.text_gates]:
        nn.init.normal_(gate.reduce.weight, std=0.5)
        nn.init.normal_(gate.expand.weight, std=0.5)
    return model


def test_every_official_key_is_mapped(full, shared_dir: Path) -> None:
    content = json.loads((shared_dir / "goldens/magnet/full_keys.json").read_text())
    official = {key: torch.empty(shape, device="meta") for key, (shape, _) in content["keys"].items()}
    conversion = full.convert_state_dict(official)
    assert conversion.unmatched == []
    assert conversion.missing == []
    assert len(conversion.renamed) + len(conversion.dropped) == content["num_keys"] == 1310
    own = full.state_dict()
    assert {k: v.shape for k, v in conversion.state_dict.items()} == {k: v.shape for k, v in own.items()}
    index = {key for key in conversion.dropped if key.endswith(("relative_position_index", "position_ids"))}
    unused = {
        start: sum(official[key].numel() for key in conversion.dropped if key.startswith(start)) for start in UNUSED
    }
    assert unused == UNUSED
    assert len(index) + sum(key.startswith(tuple(UNUSED)) for key in conversion.dropped) == len(conversion.dropped)
    parameters = sum(p.numel() for p in full.parameters())
    assert parameters + sum(UNUSED.values()) == content["total_parameters"] == 296_984_954


def test_a_recorded_case_without_padding(shared_dir: Path) -> None:
    """Without padding the official attention of the words gives zero up to rounding, and still has to agree."""
    case = shared_dir / "goldens/magnet/tiny.safetensors"
    recorded = load_file(case)
    weights = compare.official_weights(recorded)
    model, _ = compare.load_model(ADAPTER, compare.read_config(case.with_suffix(".json")), weights)
    ids = recorded["unpadded.ids"]
    batch = compare.default_batch(recorded)._replace(input_ids=ids, text_mask=torch.ones_like(ids, dtype=torch.bool))
    with torch.no_grad():
        logits = model.eval()(batch).logits
    torch.testing.assert_close(logits, recorded["unpadded.logits"], rtol=0, atol=2e-5)


def test_param_groups(full) -> None:
    groups = {group["name"]: group for group in full.param_groups(lr=5e-5, weight_decay=0.01)}
    check_param_groups(full, groups.values())
    assert {group["lr"] for group in groups.values()} == {5e-5}
    undecayed = {name for name, group in groups.items() if not group["weight_decay"]}
    assert undecayed == {"swin_no_decay", "image_fusion_no_decay"}
    tables = [p for n, p in full.named_parameters() if n.endswith("relative_position_bias_table")]
    assert {id(p) for p in tables} <= {id(p) for p in groups["swin_no_decay"]["params"]}


def test_aml_scores_each_encoder_alone(batch) -> None:
    model = build()
    one = model.alignment_features(batch)
    words = model.alignment_features(batch._replace(input_ids=batch.input_ids.flip(0)))
    image = model.alignment_features(batch._replace(image=batch.image.flip(0)))
    assert torch.equal(one.visual, words.visual)
    assert torch.equal(one.text, image.text)
    assert not torch.allclose(one.text, words.text)


def test_conditioned_features_are_those_of_the_network(batch) -> None:
    model = build(text_fusion="corrected")
    seen = []
    model.swin.layers[3].register_forward_hook(lambda module, args, output: seen.append(output))
    model.text_encoder.encoder.layer[3].register_forward_hook(lambda module, args, output: seen.append(output))
    model(batch)
    features = model.alignment_features(batch, visual="conditioned")
    torch.testing.assert_close(features.visual, seen[0].permute(0, 3, 1, 2))
    torch.testing.assert_close(features.text, seen[1])


@torch.no_grad()
def test_only_the_official_fusion_reads_padding(batch) -> None:
    """And only the corrected one lets real tokens read different things."""
    padded = batch._replace(input_ids=batch.input_ids.masked_fill(~batch.text_mask, 7))
    for fusion, reads_padding in (("official", True), ("corrected", False)):
        model = build(text_fusion=fusion)
        features, other = model.encode(batch), model.encode(padded)
        real = batch.text_mask
        assert torch.allclose(features.text[real], other.text[real], atol=1e-5) is not reads_padding
        text, x = torch.randn(1, 4, 128), torch.randn(1, 6, 32)
        read = model.text_fusion[0].read(text, x, torch.ones(1, 4, dtype=torch.bool))
        assert torch.allclose(read[0, 0], read[0, 1], atol=1e-5) is reads_padding
