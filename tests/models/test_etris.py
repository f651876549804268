"""ETRIS at full size against the official code, CLIP's ViT and its files; its own: bridges, what is scored."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file
from torch import nn

from amltrain.errors import UserError
from amltrain.losses import create_loss
from amltrain.methods.aml.options import AMLOptions
from amltrain.methods.base import build_method
from amltrain.models import create_model
from amltrain.models.backbones.clip import CLIPText, CLIPViT, load_clip_vit, resample
from amltrain.models.etris import ETRIS
from tests.models.backbones.test_clip import save_archive
from tests.models.recorded import full_size_batch, full_size_weights
from tests.models.test_cris import full_size
from tests.models.test_detris import make_batch, official
from tests.parity.etris import build

SIZES = {
    "etris_r101": ("full_keys.json", "full_r101.safetensors"),
    "etris_r50": ("full_keys_r50.json", None),
    "etris_vit_base": ("full_keys_v16.json", "full_v16.safetensors"),
}


def tiny(**kwargs: object) -> ETRIS:
    torch.manual_seed(0)
    return create_model("etris_tiny", **kwargs)


def tiny_vit() -> ETRIS:
    torch.manual_seed(0)
    vision = CLIPViT(width=48, layers=3, heads=4, table_size=6, embed_dim=64)
    text = CLIPText(width=64, layers=3, heads=4, vocab_size=512, max_positions=64, embed_dim=64)
    return ETRIS(vision=vision, text=text, bridge_dim=32, layers=1, heads=4, feedforward=64, dropout=0.0)


@pytest.mark.parametrize("name", SIZES)
def test_every_official_key_is_mapped_and_the_same_parts_train(name: str, shared_dir: Path) -> None:
    model = full_size(name)
    recorded = json.loads((shared_dir / "goldens/etris" / SIZES[name][0]).read_text())
    conversion = model.convert_state_dict(official(recorded["keys"]))
    assert (conversion.unmatched, conversion.missing, conversion.dropped) == ([], [], {})
    assert len(conversion.renamed) == len(recorded["keys"]) == len(model.state_dict())
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained == {conversion.renamed[key] for key in recorded["trainable"]}
    bridges, rest = model.param_groups(lr=1e-4, weight_decay=0.0)
    assert sum(p.numel() for p in bridges["params"]) == (598_592 if "vit" in name else 1_942_080)
    assert bridges["lr"] == rest["lr"] == 1e-4


@pytest.mark.parametrize("name", ["etris_r101", "etris_vit_base"])
def test_full_size_logits(name: str, shared_dir: Path) -> None:
    """The padded one of the two recorded samples, at 416 px."""
    folder = shared_dir / "goldens/etris"
    keys, case = SIZES[name]
    model = full_size(name)
    model.load_state_dict(model.convert_state_dict(full_size_weights(folder / keys)).state_dict, assign=True)
    recorded = load_file(folder / case)
    with torch.no_grad():
        logits = model.eval()(full_size_batch(recorded["input.ids"], 416, sample=1)).logits
    assert (logits - recorded["output.logits"][1:]).abs().max() < 5e-5


def test_the_position_table_is_resampled_as_in_the_release(shared_dir: Path) -> None:
    recorded = load_file(shared_dir / "goldens/etris/tiny.safetensors")
    before, after = recorded["extra.clip_pos_embed_before"], recorded["extra.clip_pos_embed_after"]
    side = round((len(after) - 1) ** 0.5)
    torch.testing.assert_close(resample(before, (side, side)), after, rtol=0, atol=1e-6)


def test_the_image_tower_in_openais_archive(shared_dir: Path, tmp_path: Path) -> None:
    """Both towers, in half precision."""
    case = shared_dir / "goldens/etris/tiny.safetensors"
    model = build(json.loads(case.with_suffix(".json").read_text()))
    recorded = {k: v for k, v in load_file(case).items() if k.startswith("backbone.")}
    save_archive({k.removeprefix("backbone."): v for k, v in recorded.items()}, tmp_path / "archive.pt")
    ours = model.convert_state_dict(recorded).state_dict
    load_clip_vit(model.vision, str(tmp_path / "archive.pt"))
    for key, value in model.vision.state_dict().items():
        assert torch.equal(value, ours[f"vision.{key}"].half().float()), key


def test_the_image_tower_of_timm(tmp_path: Path) -> None:
    theirs, image = timm_vit(), torch.randn(2, 3, 64, 64)
    torch.save(theirs.state_dict(), tmp_path / "timm.pth")
    vision = CLIPViT(width=48, layers=3, heads=4, table_size=4, embed_dim=24).eval()
    load_clip_vit(vision, str(tmp_path / "timm.pth"))
    with torch.no_grad():
        expected = theirs.head(theirs.forward_features(image)[:, 1:])
        torch.testing.assert_close(vision.shared(image).flatten(2).transpose(1, 2), expected, rtol=1e-4, atol=1e-5)


def timm_vit() -> timm.models.VisionTransformer:
    torch.manual_seed(0)
    model = timm.create_model(
        "vit_base_patch16_clip_quickgelu_224",
        img_size=64,
        embed_dim=48,
        depth=3,
        num_heads=4,
        num_classes=24,
    )
    nn.init.zeros_(model.head.bias)  # as timm converts OpenAI's archive, which has none
    return model.eval()


def test_a_tower_of_another_size_is_rejected(tmp_path: Path) -> None:
    torch.save(timm_vit().state_dict(), tmp_path / "other.pth")
    with pytest.raises(UserError, match=r"name weights of the same"):
        load_clip_vit(CLIPViT(width=32, layers=3, heads=4, table_size=4, embed_dim=24), str(tmp_path / "other.pth"))


@pytest.mark.parametrize(("size", "expected"), [((96, 96), (24, 24)), ((64, 112), (16, 28)), ((70, 98), (70, 98))])
def test_a_vit_takes_any_image_size(size: tuple[int, int], expected: tuple[int, int]) -> None:
    model, batch = tiny_vit().train(), make_batch(size)
    gradients = []
    for enabled in (False, True):
        model.zero_grad()
        model.set_gradient_checkpointing(enabled)
        output = model(batch)
        assert output.logits.shape == (2, 1, *expected)
        create_loss("binary_cross_entropy")(output, batch)["loss"].backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    for name, gradient in gradients[0].items():
        assert gradient is not None, name
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-4, atol=1e-6)


@torch.no_grad()
def test_the_words_reach_the_image_through_every_bridge_and_back() -> None:
    model, batch = tiny().eval(), make_batch((96, 96))
    whole = model.encode(batch)
    for bridge in model.bridges:
        kept = {n: p.clone() for n, p in bridge.expand_image.named_parameters()}
        for parameter in bridge.expand_image.parameters():
            parameter.zero_()
        assert not torch.allclose(model.encode(batch).visual[2], whole.visual[2])
        bridge.expand_image.load_state_dict(kept, strict=False)
    other = model.encode(batch._replace(image=batch.image.flip(0)))
    assert not torch.allclose(other.text, whole.text)


@torch.no_grad()
@pytest.mark.parametrize("model", [tiny, tiny_vit])
def test_scores_know_no_bridge(model: Callable[[], ETRIS]) -> None:
    """Neither the words in the image, nor the image in the words, nor the random projection beside CLIP's pool."""
    built, batch = model().eval(), make_batch((96, 96))
    expected = built.alignment_features(batch)
    for parameter in built.bridges.parameters():
        parameter.normal_()
    if isinstance(built.vision, CLIPViT):
        assert expected.visual.shape == (2, 64, 6, 6)
    else:
        assert expected.visual.shape == (2, 128, 3, 3)
        built.vision.pool.connect[0].weight.normal_()
    again = built.alignment_features(batch)
    assert torch.equal(again.visual, expected.visual)
    assert torch.equal(again.text, expected.text)
    task = build_method("aml", built, create_loss("binary_cross_entropy"), AMLOptions(projection="identity")).train()
    task.calibrate([batch])
    with torch.enable_grad():
        assert task(batch)["loss"].isfinite()


def test_frozen_encoders_keep_their_weights_but_for_positions() -> None:
    model = tiny(train_encoders=False)
    trained = {n for n, p in model.named_parameters() if p.requires_grad and n.startswith(("vision.", "text."))}
    assert trained == {"vision.pool.pos_embed", "text.positional_embedding"}


@torch.no_grad()
def test_words_of_the_first_image_stay_with_their_sentence() -> None:
    model, batch = tiny().eval(), make_batch((96, 96))
    features = model.encode(batch)
    again = model.reencode_image(batch._replace(image=batch.image.flip(0)), features)
    assert torch.equal(again.text, features.text)
    assert torch.equal(again.extra["sentence"], features.extra["sentence"])
    assert not torch.equal(again.visual[0], features.visual[0])
