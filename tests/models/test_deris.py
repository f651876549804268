"""DeRIS: official keys and groups, who looks at whom in a batch, the union of queries, referents one by one."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, SwinConfig

from amltrain.errors import UserError
from amltrain.losses import create_loss
from amltrain.models import create_model
from amltrain.models.backbones.mask2former import load_mask2former
from amltrain.records import ModelOutput
from tests.models.test_registry import make_batch
from tests.parity import compare
from tests.parity import deris as recorded_deris


@pytest.fixture
def tiny():
    torch.manual_seed(0)
    return create_model("deris_tiny", vocab_size=64).eval()


@pytest.mark.parametrize(("name", "official"), [("deris_b", "DeRIS-B"), ("deris_l", "DeRIS-L")])
def test_official_keys_and_groups(shared_dir, name, official):
    folder = shared_dir / "goldens" / "deris"
    content = json.loads((folder / "full_keys.json").read_text())[official]
    with torch.device("meta"):
        model = create_model(name)
        state = {f"module.{key}": torch.empty(shape) for key, (shape, *_) in content["keys"].items()}
    conversion = model.convert_state_dict(state)
    assert (conversion.unmatched, conversion.missing) == ([], [])
    counted = [key for key in conversion.dropped if not key.endswith(("position_index", "empty_weight"))]
    lost = sum(state[key].numel() for key in counted)
    assert sum(p.numel() for p in model.parameters()) == content["total_params"] - lost
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == content["trainable_params"] - lost
    scales = {id(p): group["lr"] for group in model.param_groups(1.0, 0.0) for p in group["params"]}
    parameters = dict(model.named_parameters())
    for group in json.loads((folder / "full_optim_groups.json").read_text())[official]:
        names = [conversion.renamed[f"module.{n}"] for n in group["names"] if f"module.{n}" in conversion.renamed]
        assert {scales[id(parameters[n])] for n in names} <= {group["lr_scale"]}


def test_without_a_gradient_in_the_official_code_is_what_is_dropped(shared_dir):
    facts = json.loads((shared_dir / "goldens" / "deris" / "tiny.json").read_text())
    recorded = load_file(shared_dir / "goldens" / "deris" / "tiny.safetensors")
    model, _ = compare.load_model(recorded_deris.ADAPTER, facts["config"], compare.official_weights(recorded))
    dropped = model.convert_state_dict(compare.official_weights(recorded)).dropped
    dead = {*facts["no_grad_params_trainable"], *facts["zero_grad_params"]}
    assert {key for key in dropped if not key.endswith(("position_index", "empty_weight"))} == dead


@pytest.mark.parametrize("case", ["tiny", "tiny_other_size"])
@torch.no_grad()
def test_a_sample_alone_differs_from_one_in_a_batch(shared_dir, case):
    """As recorded. `alone` gives in a batch what the released weights give one by one; `queries` neither."""
    folder = shared_dir / "goldens" / "deris"
    config = compare.read_config(folder / "tiny.json")
    recorded, weights = load_file(folder / f"{case}.safetensors"), load_file(folder / "tiny.safetensors")
    model, _ = compare.load_model(recorded_deris.ADAPTER, config, compare.official_weights(weights))
    batch = recorded_deris.batch(recorded)
    together = model.eval()(batch).aux
    small = recorded_deris.CASE["image_small"]

    def set_mixing(mixing):
        for loop in model.predictor.loops:
            loop.mix.mixing = mixing

    for i in range(len(small)):
        recorded_deris.CASE["image_small"] = small[i : i + 1]
        single = model(batch.mapped(lambda value: value[i : i + 1])).aux  # noqa: B023
        for name, ours in (("refer_logits", "refer3"), ("existence", "existence")):
            expected = recorded[f"extra.{name}_sample{i}_alone"]
            torch.testing.assert_close(single[ours], expected, rtol=0, atol=2e-5)
            assert (together[ours][i] - expected[0]).abs().max() > 1e-3
    recorded_deris.CASE["image_small"] = small
    set_mixing("alone")
    alone = model(batch).aux["refer3"]
    singles = [recorded[f"extra.refer_logits_sample{i}_alone"] for i in range(len(small))]
    torch.testing.assert_close(alone, torch.cat(singles), rtol=0, atol=2e-5)
    set_mixing("queries")
    assert (model(batch).aux["refer3"] - alone).abs().max() > 0.01


def test_union_equals_the_official_evaluation(shared_dir, tiny):
    recorded = load_file(shared_dir / "goldens" / "deris" / "evaluation.safetensors")
    for threshold in (50, 70, 90):
        tiny.score_threshold = threshold / 100
        logits, no_target = tiny.union(recorded["input.masks"], recorded["input.refer_logits"])
        assert torch.equal((logits[:, 0] >= 0).to(torch.uint8), recorded[f"output.mask_thr{threshold}"])
        nothing = (recorded["output.scores"] <= tiny.score_threshold).all(dim=1)
        assert torch.equal(no_target.argmax(dim=1) == 1, nothing)
        assert nothing.any() and (logits[nothing] < 0).all()


def test_one_referent_is_matched_as_by_the_hungarian_method(tiny):
    batch = make_batch("deris_tiny", 96, 96, count=3)
    batch.target[2] = 0
    with torch.no_grad():
        output = tiny(batch)
    loss = create_loss("deris", points=256)
    whole = loss(output, batch)
    instances = [(batch.target[:1] >= 128).float(), (batch.target[1:2] >= 128).float(), torch.zeros(0, 96, 96)]
    one_by_one = loss(output, batch, instances)
    for name, term in whole.items():
        torch.testing.assert_close(term, one_by_one[name], msg=name)
    halves = batch.target[0].float() / 255
    left, right = halves.clone(), halves.clone()
    left[:, :40], right[:, 40:] = 0, 0
    several = loss(output, batch, [torch.stack([left, right]), *instances[1:]])
    assert several["mask"] != whole["mask"]


def test_a_batch_without_referents_has_a_gradient_everywhere(tiny):
    batch = make_batch("deris_tiny", 96, 96)._replace(target=torch.zeros(2, 96, 96, dtype=torch.uint8))
    for instances in (None, [torch.zeros(0, 96, 96)] * 2):
        tiny.zero_grad()
        result = create_loss("deris", points=64)(tiny.train()(batch), batch, instances)
        result["loss"].backward()
        assert result["mask"] == result["dice"] == 0
        assert all(p.grad is not None and p.grad.isfinite().all() for p in tiny.parameters())


def test_frozen_swin_is_noisy_in_training_as_released():
    torch.manual_seed(0)
    model = create_model("deris_tiny", vocab_size=64, drop_path_rate=0.5)
    model.swin.requires_grad_(False)
    image = torch.randn(1, 3, 96, 96)
    assert not torch.equal(model.train().swin(image)[-1], model.swin(image)[-1])
    assert torch.equal(model.eval().swin(image)[-1], model.swin(image)[-1])


def test_loss_rejects_a_model_without_its_heads():
    batch = make_batch("deris_tiny", 96, 96)
    with pytest.raises(UserError, match="queries of several steps"):
        create_loss("deris")(ModelOutput(torch.zeros(2, 1, 24, 24)), batch)


@pytest.fixture
def mask2former():
    """As deris_tiny, with more layers and queries than it takes."""
    torch.manual_seed(1)
    stages = [f"stage{i + 1}" for i in range(4)]
    swin = SwinConfig(
        embed_dim=32,
        depths=[1, 1, 2, 1],
        num_heads=[2, 4, 8, 8],
        window_size=4,
        out_features=stages,
        drop_path_rate=0.0,
    )
    config = Mask2FormerConfig(
        backbone_config=swin,
        feature_size=64,
        mask_feature_size=64,
        hidden_dim=64,
        num_attention_heads=4,
        encoder_layers=2,
        encoder_feedforward_dim=128,
        decoder_layers=5,
        dim_feedforward=128,
        num_queries=9,
    )
    theirs = Mask2FormerForUniversalSegmentation(config).eval()
    for parameter in theirs.parameters():
        parameter.data.add_(0.05 * torch.randn_like(parameter))
    return theirs


@torch.no_grad()
def test_perception_starts_from_transformers_mask2former(mask2former, tmp_path):
    """Swin's maps, the pixel decoder's scales and a whole query layer equal transformers'."""
    mask2former.save_pretrained(tmp_path / "mask2former")
    model = create_model("deris_tiny", vocab_size=64, vision_weights=str(tmp_path / "mask2former")).eval()
    image = torch.randn(2, 3, 128, 128)
    pixels = mask2former.model.pixel_level_module
    maps = model.swin(image)
    for ours, theirs in zip(maps, pixels.encoder(image).feature_maps, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    _, scales = model.pixel_decoder(maps)
    for ours, theirs in zip(scales, pixels.decoder(list(maps)).multi_scale_features, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)
    predictor, decoder = model.predictor, mask2former.model.transformer_module.decoder
    x, place = torch.randn(2, 5, 64), predictor.query_embed.weight
    torch.testing.assert_close(place, mask2former.model.transformer_module.queries_embedder.weight[:5])
    layer = decoder.layers[1]
    read, _ = layer.self_attn(x.transpose(0, 1), position_embeddings=place[:, None].expand(-1, 2, -1))
    expected = layer.self_attn_layer_norm(x + read.transpose(0, 1))
    ours = predictor.read_queries[1](x, x + place, x + place, x)
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)
    expected = layer.final_layer_norm(ours + layer.fc2(layer.activation_fn(layer.fc1(ours))))
    torch.testing.assert_close(predictor.feedforward[1](ours), expected, rtol=1e-4, atol=1e-5)
    embedder = decoder.mask_predictor.mask_embedder
    torch.testing.assert_close(predictor.mask_embed(x), embedder(x), rtol=1e-4, atol=1e-5)
    assert model.pixel_decoder.lateral[0].bias.abs().max() == model.pixel_decoder.merge[0].bias.abs().max() == 0


def test_mask2former_of_another_size_is_rejected(mask2former, tmp_path):
    mask2former.save_pretrained(tmp_path / "mask2former")
    with torch.device("meta"):
        model = create_model("deris_b")
    with pytest.raises(UserError, match="Mask2Former of the same sizes"):
        load_mask2former(model, str(tmp_path / "mask2former"))
