"""DETRIS at full size against the official code; its own: frozen parts, alignment, suppression, odd sizes."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from amltrain.losses import create_loss
from amltrain.models import RISModel, check_param_groups, create_model
from amltrain.models.detris import DETRIS
from amltrain.records import Batch, ModelOutput
from tests.models.recorded import full_size_batch, full_size_weights

SIZES = {
    "detris_base": ("full_keys.json", 175_529_778, 25_518_129),
    "detris_large": ("full_keys_large.json", 394_106_930, 26_306_097),
    "detris_large_mixed": ("full_keys_large_mixed.json", 424_327_842, 56_527_009),
}


def full_size(name: str) -> RISModel:
    with torch.device("meta"):
        return create_model(name)


def official(keys: dict[str, tuple[list[int], str]]) -> dict[str, Tensor]:
    return {key: torch.empty(shape, device="meta") for key, (shape, _) in keys.items()}


def make_batch(size: tuple[int, int] = (98, 98), seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    text_mask = torch.tensor([[True] * 6, [True] * 4 + [False] * 2])
    return Batch(
        image=torch.randn(2, 3, *size, generator=generator),
        input_ids=torch.randint(1, 512, (2, 6), generator=generator) * text_mask,
        text_mask=text_mask,
        target=torch.randint(0, 256, (2, *size), generator=generator).to(torch.uint8),
        no_target=torch.zeros(2, dtype=torch.bool),
        sample_id=torch.arange(2),
        random_key=torch.arange(2),
        geometry=torch.zeros(2, 6, dtype=torch.float64),
    )


def tiny(**kwargs: object) -> DETRIS:
    torch.manual_seed(0)
    return create_model("detris_tiny", **kwargs)


@pytest.mark.parametrize("name", SIZES)
def test_counts_and_trainable_parts(name: str, shared_dir: Path) -> None:
    file, total, trainable = SIZES[name]
    model = full_size(name)
    assert sum(p.numel() for p in model.parameters()) == total
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == trainable
    recorded = json.loads((shared_dir / "goldens/detris" / file).read_text())
    renamed = model.convert_state_dict(official(recorded["keys"])).renamed
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {renamed[k] for k in recorded["trainable"]}


@pytest.mark.parametrize("name", SIZES)
def test_every_official_key_is_mapped(name: str, shared_dir: Path) -> None:
    model = full_size(name)
    keys = json.loads((shared_dir / "goldens/detris" / SIZES[name][0]).read_text())["keys"]
    conversion = model.convert_state_dict(official(keys))
    assert (conversion.unmatched, conversion.missing, conversion.dropped) == ([], [], {})
    assert len(conversion.renamed) == len(keys) == len(model.state_dict())


def test_full_size_logits(shared_dir: Path) -> None:
    """The padded one of the two recorded samples, at 448 px."""
    folder = shared_dir / "goldens/detris"
    model = full_size("detris_base")
    weights = full_size_weights(folder / "full_keys.json")
    model.load_state_dict(model.convert_state_dict(weights).state_dict, assign=True)
    recorded = load_file(folder / "full_base.safetensors")
    batch = full_size_batch(recorded["input.ids"], 448, sample=1)
    with torch.no_grad():
        features = model.eval().encode(batch)
        logits = model.decode(features, batch).logits
    assert (features.text - recorded["inter.text.tokens"][1:]).abs().max() < 5e-5
    assert (logits - recorded["output.logits"][1:]).abs().max() < 5e-5


def test_groups_are_the_releases(shared_dir: Path) -> None:
    recorded = json.loads((shared_dir / "goldens/detris/full_keys.json").read_text())["param_groups"]
    model = full_size("detris_base")
    groups = model.param_groups(lr=1e-4, weight_decay=0.0)
    check_param_groups(model, groups)
    assert [(g["name"], len(g["params"]), sum(p.numel() for p in g["params"])) for g in groups] == [
        ("adapters", recorded["backbone_group_tensors"], recorded["backbone_group_params"]),
        ("head", recorded["head_group_tensors"], recorded["head_group_params"]),
    ]
    assert [g["lr"] for g in groups] == recorded["initial_lr"]


@pytest.mark.parametrize("train_encoders", [True, False])
def test_frozen_parts_get_no_gradient_and_all_others_do(train_encoders: bool) -> None:
    model = tiny(train_encoders=train_encoders).train()
    check_param_groups(model, model.param_groups(lr=1e-4, weight_decay=0.0))
    assert model.alignment_is_frozen is not train_encoders
    batch = make_batch()
    create_loss("binary_cross_entropy")(model(batch), batch)["loss"].backward()
    for name, parameter in model.named_parameters():
        encoder = name.startswith(("vision.", "text."))
        unread = name in ("vision.mask_token", "text.logit_scale")
        assert (parameter.grad is not None) == (not unread and (train_encoders or not encoder)), name


def test_alignment_reads_the_encoders_alone() -> None:
    model = tiny().eval()
    batch = make_batch()
    with torch.no_grad():
        before = model.alignment_features(batch)
        other_words = model.alignment_features(batch._replace(input_ids=batch.input_ids.flip(0)))
        for parameter in (*model.aligners.parameters(), *model.text_adapters.parameters()):
            parameter.normal_()
        after = model.alignment_features(batch)
    assert (before.visual.shape[1], before.text.shape[2]) == model.alignment_dims
    assert before.visual.shape[2:] == (14, 14)
    assert torch.equal(before.visual, after.visual)
    assert torch.equal(before.text, after.text)
    assert torch.equal(before.visual, other_words.visual)
    assert not torch.equal(before.text, other_words.text)


def test_another_image_with_the_same_words() -> None:
    model = tiny().eval()
    batch, other = make_batch(), make_batch(seed=1)._replace(input_ids=make_batch().input_ids)
    with torch.no_grad():
        again = model.reencode_image(other, model.encode(batch))
        expected = model.encode(other)
    assert torch.equal(again.text, expected.text)
    assert all(torch.equal(a, b) for a, b in zip(again.visual, expected.visual, strict=True))


def test_nobody_reads_a_suppressed_position() -> None:
    decoder = tiny().decoder.eval()
    x, text, text_mask = torch.randn(2, 64, 4, 4), torch.randn(2, 5, 64), torch.ones(2, 5, dtype=torch.bool)
    suppressed = torch.zeros(2, 4, 4, dtype=torch.bool)
    suppressed[:, 1, 2] = True
    changed = x.clone()
    changed[:, :, 1, 2] += 1
    with torch.no_grad():
        a, b = decoder(x, text, text_mask, suppressed), decoder(changed, text, text_mask, suppressed)
        whole = decoder(x, text, text_mask)
        nothing_left = decoder(x, text, text_mask, torch.ones_like(suppressed))
    others = ~suppressed[:, None].expand_as(a)
    torch.testing.assert_close(a[others], b[others])
    assert (a - whole)[others].abs().max() > 1e-3
    torch.testing.assert_close(nothing_left, whole)


def test_pads_hide_from_the_decoder() -> None:
    decoder = tiny().decoder.eval()
    x, text = torch.randn(1, 64, 3, 3), torch.randn(1, 5, 64)
    text_mask = torch.tensor([[True, True, True, False, False]])
    with torch.no_grad():
        torch.testing.assert_close(decoder(x, text, text_mask), decoder(x, text[:, :3], text_mask[:, :3]))


@pytest.mark.parametrize(("size", "expected"), [((98, 98), (56, 56)), ((70, 35), (40, 20)), ((97, 113), (97, 113))])
def test_any_input_size(size: tuple[int, int], expected: tuple[int, int]) -> None:
    batch = make_batch(size)
    output = tiny().train()(batch)
    assert output.logits.shape == (2, 1, *expected)
    assert create_loss("binary_cross_entropy")(output, batch)["loss"].isfinite()


def test_checkpointing_changes_neither_gradients_nor_running_statistics() -> None:
    results = []
    for enabled in (False, True):
        model, batch = tiny().train(), make_batch()
        model.set_gradient_checkpointing(enabled)
        create_loss("binary_cross_entropy")(model(batch), batch)["loss"].backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        results.append({**gradients, **dict(model.named_buffers())})
    assert results[0].keys() == results[1].keys()
    for name, value in results[0].items():
        torch.testing.assert_close(results[1][name], value, msg=name)


def test_the_loss_keeps_soft_edges() -> None:
    batch = make_batch((4, 4))
    batch = batch._replace(target=torch.arange(32, dtype=torch.uint8).reshape(2, 4, 4) * 8)
    logits = torch.randn(2, 1, 2, 2)
    loss = create_loss("binary_cross_entropy")(ModelOutput(logits), batch)["loss"]
    target = batch.target[:, None, ::2, ::2].float() / 255  # nearest: index floor(i * 2)
    expected = -(target * logits.sigmoid().log() + (1 - target) * (1 - logits.sigmoid()).log()).mean()
    torch.testing.assert_close(loss, expected)
