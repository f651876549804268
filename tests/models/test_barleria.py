"""BarLeRIa at full size against the official key lists, counts and recorded logits; its gate; what AML scores."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from amltrain.models import check_param_groups, create_model
from amltrain.records import Batch
from tests.models.recorded import full_size_weights
from tests.models.test_registry import make_batch
from tests.parity import compare
from tests.parity.barleria import ADAPTER

LISTS = {"vit_base": "full_keys.json", "eva02_base": "full_keys_eva.json"}
EVA_NORM = 2 * 768  # the official code never applies it


@pytest.fixture(params=list(LISTS))
def tower(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def batch() -> Batch:
    return make_batch("barleria_tiny", 64, 96)


def full(tower: str) -> nn.Module:
    with torch.device("meta"):
        return create_model(f"barleria_{tower}")


def build(**kwargs) -> nn.Module:
    torch.manual_seed(0)
    return create_model("barleria_tiny", vocab_size=64, **kwargs).eval()


def test_every_official_key_is_mapped(tower: str, shared_dir: Path) -> None:
    content = json.loads((shared_dir / "goldens/barleria" / LISTS[tower]).read_text())
    official = {key: torch.empty(shape, device="meta") for key, (shape, _) in content["keys"].items()}
    model = full(tower)
    conversion = model.convert_state_dict(official)
    assert conversion.unmatched == []
    assert conversion.missing == []
    assert len(conversion.renamed) + len(conversion.dropped) == content["n_keys"]
    own = model.state_dict()
    assert {k: v.shape for k, v in conversion.state_dict.items()} == {k: v.shape for k, v in own.items()}
    reasons = {"log_jacobians": 576}
    if tower == "eva02_base":
        reasons |= {"freqs_": 26, "visual.norm.": 2}
    counts = {part: sum(part in key for key in conversion.dropped) for part in reasons}
    assert counts == reasons
    assert len(conversion.dropped) == sum(reasons.values())
    unused = EVA_NORM if tower == "eva02_base" else 0
    assert sum(p.numel() for p in model.parameters()) == content["total_params"] - unused
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == content["trainable_params"]


def test_what_trains_and_at_which_rate(tower: str) -> None:
    model = full(tower)
    groups = {group["name"]: group for group in model.param_groups(lr=1e-4, weight_decay=0.0)}
    check_param_groups(model, groups.values())
    assert {name: group["lr"] for name, group in groups.items()} == {"adapters": 1e-4, "rest": 1e-4}
    assert len(groups["adapters"]["params"]) == 676
    assert sum(p.numel() for p in groups["adapters"]["params"]) == 349_152
    towers = {n for n, p in model.named_parameters() if p.requires_grad and n.startswith(("vision.", "text."))}
    tables = {"text.positional_embedding"}
    assert towers == (tables | {"vision.positional_embedding"} if tower == "vit_base" else tables)


@pytest.mark.parametrize("case", ["tiny", "tiny_eva"])
def test_one_sample_alone_is_the_recorded_one(case: str, shared_dir: Path) -> None:
    """The official gate couples the samples of a batch: alone, each has other logits."""
    path = shared_dir / f"goldens/barleria/{case}.safetensors"
    recorded = load_file(path)
    config = compare.read_config(path.with_suffix(".json"))
    model, _ = compare.load_model(ADAPTER, config, compare.official_weights(recorded))
    batch = ADAPTER.batch(recorded)
    for i in range(2):
        alone = batch.mapped(lambda part, i=i: part[i : i + 1])
        with torch.no_grad():
            logits = model.eval()(alone).logits
        torch.testing.assert_close(logits, recorded[f"extra.logits_sample{i}_alone"], rtol=0, atol=1e-5)
        assert (logits - recorded["output.logits"][i]).abs().max() > 0.05


@torch.no_grad()
def test_only_the_official_gate_couples_a_batch(batch: Batch) -> None:
    alone = batch.mapped(lambda part: part[:1])
    for norm, coupled in (("batch", True), ("channel", False)):
        model = build(gate_norm=norm)
        one, both = model.encode(alone).extra["side"], model.encode(batch).extra["side"][:1]
        assert torch.allclose(one, both, atol=1e-5) is not coupled


def test_aml_scores_the_towers_without_prompts_and_flows(batch: Batch) -> None:
    model = build()
    one = model.alignment_features(batch)
    other = model.alignment_features(batch._replace(input_ids=batch.input_ids.flip(0)))
    assert torch.equal(one.visual, other.visual)
    torch.testing.assert_close(one.visual, model.vision.shared(batch.image))
    nn.init.normal_(model.vision_flows[0][0].mu)
    assert torch.equal(model.alignment_features(batch).visual, one.visual)


@pytest.mark.slow
@pytest.mark.parametrize(("tower", "case"), [("vit_base", "full_v16"), ("eva02_base", "full_eva02")])
def test_full_size_logits_are_the_recorded_ones(tower: str, case: str, shared_dir: Path) -> None:
    folder = shared_dir / "goldens/barleria"
    recorded = load_file(folder / f"{case}.safetensors")
    weights = full_size_weights(folder / LISTS[tower])
    for key in list(weights):
        if ".log_jacobians." in key or "freqs_" in key:
            del weights[key]
    weights["side_adapter_network.proj.2.weight"] *= 0.3
    model = create_model(f"barleria_{tower}").eval()
    model.load_state_dict(model.convert_state_dict(weights).state_dict)
    batch = make_batch(f"barleria_{tower}", 416, 416)
    image = torch.from_numpy(np.random.default_rng(1).standard_normal((2, 3, 416, 416), dtype=np.float32))
    ids = recorded["input.ids"]
    with torch.no_grad():
        logits = model(batch._replace(image=image, input_ids=ids, text_mask=ids != 0)).logits
    torch.testing.assert_close(logits, recorded["output.logits"], rtol=0, atol=1e-4)
