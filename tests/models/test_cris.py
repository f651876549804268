"""CRIS at full size against the official code, its encoders' files; its own: shared space, suppression, sizes."""

import json
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file
from timm.layers import BatchNormAct2d, convert_sync_batchnorm
from torch import nn

from amltrain.errors import UserError
from amltrain.losses import create_loss
from amltrain.methods.aml.options import AMLOptions
from amltrain.methods.base import build_method
from amltrain.models import RISModel, check_param_groups, create_model
from amltrain.models.backbones.resnet import CLIPResNet, load_clip_resnet
from tests.models.backbones.test_clip import save_archive
from tests.models.recorded import full_size_batch, full_size_weights
from tests.models.test_detris import make_batch, official
from tests.parity.cris import build

SIZES = {
    "cris_r101": ("full_keys.json", "full_r101.safetensors", 161_251_682),
    "cris_r50": ("full_keys_r50.json", "full_r50.safetensors", 146_849_122),
}


def full_size(name: str) -> RISModel:
    with torch.device("meta"):
        return create_model(name)


def tiny() -> RISModel:
    torch.manual_seed(0)
    return create_model("cris_tiny")


@pytest.mark.parametrize("name", SIZES)
def test_counts_keys_and_groups(name: str, shared_dir: Path) -> None:
    file, _, total = SIZES[name]
    model = full_size(name)
    recorded = json.loads((shared_dir / "goldens/cris" / file).read_text())
    conversion = model.convert_state_dict(official(recorded["keys"]))
    assert (conversion.unmatched, conversion.missing, conversion.dropped) == ([], [], {})
    assert sum(p.numel() for p in model.parameters()) == total
    groups = model.param_groups(lr=1e-4, weight_decay=0.0)
    check_param_groups(model, groups)
    counts = [(len(g["params"]), sum(p.numel() for p in g["params"])) for g in groups]
    theirs = recorded["param_groups"]
    # CLIP's temperature, one number that nothing reads, is in the official code's group and frozen here
    assert counts == [
        (theirs["backbone_group_tensors"] - 1, theirs["backbone_group_params"] - 1),
        (theirs["head_group_tensors"], theirs["head_group_params"]),
    ]
    assert [g["lr"] for g in groups] == pytest.approx(theirs["initial_lr"])


def test_full_size_logits(shared_dir: Path) -> None:
    """RN50, the padded one of the two recorded samples, at 416 px."""
    folder = shared_dir / "goldens/cris"
    keys, case, _ = SIZES["cris_r50"]
    model = full_size("cris_r50")
    model.load_state_dict(model.convert_state_dict(full_size_weights(folder / keys)).state_dict, assign=True)
    recorded = load_file(folder / case)
    with torch.no_grad():
        logits = model.eval()(full_size_batch(recorded["input.ids"], 416, sample=1)).logits
    assert (logits - recorded["output.logits"][1:]).abs().max() < 5e-5


@pytest.mark.parametrize("form", ["archive.pt", "timm.pth"])
def test_the_image_towers_files(form: str, shared_dir: Path, tmp_path: Path) -> None:
    case = shared_dir / "goldens/cris/tiny.safetensors"
    model = build(json.loads(case.with_suffix(".json").read_text()))
    recorded = {k: v for k, v in load_file(case).items() if k.startswith("backbone.")}
    ours = model.convert_state_dict(recorded).state_dict
    expected = {k.removeprefix("vision."): v for k, v in ours.items() if k.startswith("vision.")}
    path = tmp_path / form
    if form == "archive.pt":  # OpenAI's: both towers, without CRIS' own projection, in half precision
        save_archive({k.removeprefix("backbone."): v for k, v in recorded.items() if ".connect." not in k}, path)
        expected = {k: v.half().float() if v.is_floating_point() else v for k, v in expected.items()}
    else:
        torch.save({k.replace("pool.", "head."): v for k, v in expected.items() if ".connect." not in k}, path)
    load_clip_resnet(model.vision, str(path))
    for key, value in model.vision.state_dict().items():
        assert ".connect." in key or torch.equal(value, expected[key]), key


def test_another_size_is_rejected(tmp_path: Path) -> None:
    torch.save(tiny().vision.state_dict(), tmp_path / "ours.pth")
    with pytest.raises(UserError, match=r"does not belong to this CLIPResNet|is missing for this CLIPResNet"):
        load_clip_resnet(CLIPResNet(width=16, depths=(1, 1, 1, 1)), str(tmp_path / "ours.pth"))


def test_the_stages_are_timms() -> None:
    theirs = timm.create_model("resnet50_clip", num_classes=0, global_pool="", device="meta")
    ours = full_size("cris_r50").vision
    stages = {k: v.shape for k, v in theirs.state_dict().items() if k.startswith(("stem.", "stages."))}
    assert stages == {k: v.shape for k, v in ours.state_dict().items() if not k.startswith("pool.")}


def test_every_part_learns() -> None:
    model, batch = tiny().train(), make_batch((96, 96))
    create_loss("binary_cross_entropy")(model(batch), batch)["loss"].backward()
    without = {name for name, p in model.named_parameters() if p.grad is None}
    assert without == {"text.logit_scale"}


@pytest.mark.parametrize(("size", "expected"), [((96, 96), (24, 24)), ((64, 128), (16, 32)), ((97, 113), (97, 113))])
def test_any_input_size(size: tuple[int, int], expected: tuple[int, int]) -> None:
    assert tiny().train()(make_batch(size)).logits.shape == (2, 1, *expected)


def test_both_sides_of_the_score_share_a_space() -> None:
    model, batch = tiny(), make_batch((96, 96))
    features = model.alignment_features(batch)
    assert (features.visual.shape, features.text.shape) == ((2, 128, 3, 3), (2, 6, 128))
    task = build_method("aml", model, create_loss("binary_cross_entropy"), AMLOptions(projection="identity")).train()
    task.calibrate([batch])
    assert task(batch)["loss"].isfinite()


def test_a_suppressed_cell_hides_four_of_the_decoder() -> None:
    model, batch = tiny().eval(), make_batch((96, 96))
    features = model.encode(batch)
    seen = []
    model.decoder.register_forward_hook(lambda module, inputs, output: seen.append(inputs[3]))
    suppressed = torch.zeros(2, 3, 3, dtype=torch.bool)
    suppressed[0, 1, 2] = True
    model.decode(features._replace(suppressed=suppressed), batch)
    expected = torch.zeros(2, 6, 6, dtype=torch.bool)
    expected[0, 2:4, 4:6] = True
    assert torch.equal(seen[0], expected)


def test_checkpointing_changes_neither_gradients_nor_running_statistics() -> None:
    results = []
    for enabled in (False, True):
        model, batch = tiny().train(), make_batch((96, 96))
        model.set_gradient_checkpointing(enabled)
        create_loss("binary_cross_entropy")(model(batch), batch)["loss"].backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        results.append({**gradients, **dict(model.named_buffers())})
    for name, value in results[0].items():
        torch.testing.assert_close(results[1][name], value, msg=name)


def test_sync_batch_norm_keeps_the_activations() -> None:
    """As training converts it; torch's own conversion would lose the ReLUs that timm fuses into batch norms."""
    model, batch = tiny().eval(), make_batch((96, 96))
    with torch.no_grad():
        expected = model(batch).logits
        converted = convert_sync_batchnorm(model)
        assert not any(type(m) is nn.BatchNorm2d or isinstance(m, BatchNormAct2d) for m in converted.modules())
        torch.testing.assert_close(converted(batch).logits, expected)
