"""ReLA: the official code's sizes, keys and groups; what the words reach; what regions may read; its loss."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file

from amltrain.losses import create_loss
from amltrain.models import check_param_groups, create_model
from amltrain.models.backbones.resnet import ResNet50
from amltrain.models.layers.region_decoder import RegionDecoder, open_empty_rows
from amltrain.models.rela import RESNET_NAMES
from amltrain.records import Batch, ModelOutput
from tests.parity import compare
from tests.parity import rela as recorded_rela


def batch_of(height: int = 96, width: int = 96) -> Batch:
    torch.manual_seed(0)
    return Batch(
        image=torch.randn(2, 3, height, width),
        input_ids=torch.randint(5, 60, (2, 7)),
        text_mask=torch.tensor([[True] * 7, [True] * 4 + [False] * 3]),
        target=torch.zeros(2, height, width, dtype=torch.uint8),
        no_target=torch.tensor([False, True]),
        sample_id=torch.arange(2),
        random_key=torch.arange(2),
        geometry=torch.zeros(2, 6, dtype=torch.float64),
    )


@pytest.fixture(scope="module")
def tiny():
    torch.manual_seed(0)
    return create_model("rela_tiny", vocab_size=64).eval()


@pytest.mark.parametrize(
    ("name", "count"), [("rela_swin_base", 225_521_469), ("rela_swin_tiny", 162_560_575), ("rela_r50", 153_368_197)]
)
def test_parameters_of_the_release(name, count):
    with torch.device("meta"):
        model = create_model(name)
    assert sum(p.numel() for p in model.parameters()) == count
    check_param_groups(model, model.param_groups(1e-5, 0.05))


def test_official_keys_and_groups(shared_dir):
    keys = json.loads((shared_dir / "goldens/rela/full_keys.json").read_text())["keys"]
    with torch.device("meta"):
        model = create_model("rela_swin_base")
        official = {key: torch.empty(shape) for key, (shape, _) in keys.items()}
    conversion = model.convert_state_dict({**official, "text_encoder.embeddings.position_ids": torch.empty(1, 512)})
    assert not conversion.unmatched
    assert not conversion.missing
    assert len(conversion.renamed) + len(conversion.dropped) == len(keys) + 1
    groups = {g["name"]: (len(g["params"]), g["weight_decay"]) for g in model.param_groups(1e-5, 0.05)}
    assert groups == {"decay": (460, 0.05), "no_decay": (231, 0.0), "text": (160, 0.05)}


def test_official_keys_of_resnet():
    """detectron2's names for a ResNet-50, counted: 53 convolutions with 4 tensors of frozen batch norm each."""
    keys = ["stem.conv1"]
    for stage, blocks in zip((2, 3, 4, 5), (3, 4, 6, 3), strict=True):
        keys += [f"res{stage}.{block}.conv{i}" for block in range(blocks) for i in (1, 2, 3)] + [
            f"res{stage}.0.shortcut"
        ]
    norms = ("norm.weight", "norm.bias", "norm.running_mean", "norm.running_var")
    with torch.device("meta"):
        backbone = ResNet50()
    renamed = [f"backbone.{key}.{part}" for key in keys for part in ("weight", *norms)]
    for pattern, replacement in RESNET_NAMES:
        renamed = [re.sub(pattern, replacement, key) for key in renamed]
    assert len(renamed) == 53 * 5
    assert set(renamed) == {f"backbone.{key}" for key in backbone.state_dict()}


def test_release_loader_forgets_the_language_weight(shared_dir):
    """The recorded evaluation without `lang_weight`, as the header says how to repeat it, and the loss's parts."""
    folder = shared_dir / "goldens/rela"
    recorded = load_file(folder / "tiny.safetensors")
    config = json.loads((folder / "tiny.json").read_text())["config"]
    model, _ = compare.load_model(recorded_rela.ADAPTER, config, compare.official_weights(recorded))
    batch = recorded_rela.batch(recorded)
    model.eval()
    with torch.no_grad():
        parts = create_loss("rela")(model(batch), batch)
        model.region_decoder.layers[0].read_words.weight.zero_()
        logits = model(batch).logits
    torch.testing.assert_close(logits, recorded["output.logits_lang_weight_dropped"], rtol=0, atol=1e-5)
    ours = torch.stack([parts[name] for name in ("mask_loss", "minimap_loss", "no_target_loss")])
    torch.testing.assert_close(ours, recorded["output.loss_parts"], rtol=0, atol=2e-6)


@pytest.mark.parametrize(("height", "width"), [(96, 96), (70, 101)])
def test_shapes_at_any_size(tiny, height, width):
    batch = batch_of(height, width)
    with torch.no_grad():
        output = tiny(batch)
        aligned = tiny.alignment_features(batch)
    assert output.logits.shape == (2, 2, height, width)
    assert output.aux["no_target"].shape == (2, 2)
    assert output.aux["minimap"].shape == (2, 100, 2)
    assert output.aux["fused_visual"].shape[-2:] == aligned.visual.shape[-2:]
    assert (aligned.visual.shape[1], aligned.text.shape[2]) == tiny.alignment_dims


def test_alignment_sees_no_words(tiny):
    """Even with open gates, which let the words into the trunk itself."""
    model = create_model("rela_tiny", vocab_size=64).eval()
    for gate in model.backbone.gates:
        torch.nn.init.normal_(gate.reduce.weight)
        torch.nn.init.normal_(gate.expand.weight)
    one = batch_of()
    other = one._replace(input_ids=one.input_ids.flip(1))
    with torch.no_grad():
        assert torch.equal(model.alignment_features(one).visual, model.alignment_features(other).visual)
        assert not torch.equal(model.encode(one).visual[3], model.encode(other).visual[3])


def test_encoding_another_image_keeps_the_words(tiny):
    batch = batch_of()
    dark = batch._replace(image=batch.image * 0.5)
    with torch.no_grad():
        kept = tiny.reencode_image(dark, tiny.encode(batch))
        encoded = tiny.encode(dark)
    torch.testing.assert_close(kept.visual[3], encoded.visual[3])
    assert torch.equal(kept.text, encoded.text)


def test_closed_gates_get_a_gradient_that_is_zero(tiny):
    """The official code's dead gates: trainable, but they never move (see the header of the model)."""
    batch = batch_of()
    create_loss("rela")(tiny(batch), batch)["loss"].backward()
    assert all(p.grad is not None for p in tiny.parameters())
    assert all(p.grad.abs().max() == 0 for p in tiny.backbone.gates.parameters())
    tiny.zero_grad()


def test_rows_are_opened_but_suppression_stays():
    outside = torch.tensor([[[True, True, True], [True, False, True]]])
    assert open_empty_rows(outside, None).tolist() == [[[False, False, False], [True, False, True]]]
    hidden = torch.tensor([[True, False, False]])
    assert open_empty_rows(outside, hidden).tolist() == [[[True, False, False], [True, False, True]]]
    everything = torch.tensor([[True, True, True]])
    assert torch.equal(open_empty_rows(outside, everything), open_empty_rows(outside, None))


def test_suppressed_positions_are_not_read():
    torch.manual_seed(0)
    decoder = RegionDecoder(dim=32, mask_dim=32, text_dim=16, layers=3, heads=4, feedforward=32).eval()
    features, text = torch.randn(1, 32, 8, 8), torch.randn(1, 5, 16)
    scales = [torch.randn(1, 32, size, size) for size in (2, 4, 8)]
    suppressed = torch.tensor([[[True, False], [False, False]]])
    changed = [scale.clone() for scale in scales]
    for scale in changed:
        scale[..., : scale.shape[-1] // 2, : scale.shape[-1] // 2] += 5
    with torch.no_grad():
        hidden = [decoder(features, maps, text, suppressed).masks for maps in (scales, changed)]
        seen = [decoder(features, maps, text).masks for maps in (scales, changed)]
    assert torch.equal(*hidden)
    assert not torch.allclose(*seen)


def test_minimap_cells_are_the_referents_only_where_it_covers_them():
    target = torch.zeros(1, 40, 40, dtype=torch.uint8)
    target[:, :20, :14] = 255  # five rows of cells, three and a half columns of them
    output = ModelOutput(torch.zeros(1, 2, 40, 40), {"minimap": torch.zeros(1, 100, 2)})
    cells = create_loss("rela").minimap_target(target >= 128, output).view(10, 10)
    assert cells.sum() == 5 * 3
    assert cells[:5, :3].all()


def test_loss_by_hand():
    """Even logits cost log 2 everywhere, whatever the class weights: 5 * (1 + 0.1 + 0.1) log 2."""
    batch = batch_of()
    aux = {"minimap": torch.zeros(2, 100, 2), "no_target": torch.zeros(2, 2)}
    parts = create_loss("rela")(ModelOutput(torch.zeros(2, 2, 96, 96), aux), batch)
    assert parts["loss"].item() == pytest.approx(6 * 0.693147, rel=1e-5)


def test_loss_rejects_a_model_without_its_heads():
    with pytest.raises(ValueError, match="minimap"):
        create_loss("rela")(ModelOutput(torch.zeros(2, 2, 96, 96)), batch_of())
