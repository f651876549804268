"""AML around a real tiny CARIS: what it returns, what it trains, what it repeats, what it rejects."""

import pytest
import torch

from amltrain.errors import UserError
from amltrain.losses import create_loss
from amltrain.methods.aml.method import AML
from amltrain.methods.aml.options import AMLOptions
from amltrain.methods.base import Supervised, build_method
from amltrain.models import create_model
from amltrain.models.base import check_param_groups
from amltrain.randomness import random_key
from amltrain.records import Batch


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def make_batch(batch: int = 2, size: tuple[int, int] = (96, 96), tokens: int = 8, seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    target = torch.zeros(batch, *size, dtype=torch.uint8)
    target[:, 10:50, 20:70] = 255
    text_mask = torch.ones(batch, tokens, dtype=torch.bool)
    text_mask[-1, tokens - 3 :] = False
    return Batch(
        image=torch.randn(batch, 3, *size, generator=generator),
        input_ids=torch.randint(5, 500, (batch, tokens), generator=generator),
        text_mask=text_mask,
        target=target,
        no_target=torch.zeros(batch, dtype=torch.bool),
        sample_id=torch.arange(batch),
        random_key=torch.tensor([random_key(0, 0, i) for i in range(batch)]),
        geometry=torch.tensor([[*size, 1.0, 1.0, 0.0, 0.0]] * batch, dtype=torch.float64),
    )


def make_task(model_kwargs: dict | None = None, **aml):
    torch.manual_seed(0)
    model = create_model("caris_tiny", **(model_kwargs or {}))
    return build_method("aml", model, create_loss("weighted_cross_entropy"), AMLOptions(**aml))


def calibrated(task: AML, batch: Batch) -> AML:
    task.calibrate([batch])
    return task


def test_disabled_is_the_plain_baseline() -> None:
    model, batch = create_model("caris_tiny"), make_batch()
    task = build_method("supervised", model, create_loss("weighted_cross_entropy"))
    assert isinstance(task, Supervised)
    torch.testing.assert_close(task(batch)["loss"], task.loss(task.model(batch), batch)["loss"])
    assert task.setup(iter([])) == []


def test_paper_step_is_the_loss_on_the_masked_image() -> None:
    batch = make_batch()
    task = calibrated(make_task(tau=0.6), batch)
    result = task(batch)
    blocks = task.blocks(task.score(batch), batch)
    assert 0 < result["masked_share"] == blocks.float().mean()
    masked = batch._replace(image=task.masked_image(batch.image, blocks, task.score(batch)))
    assert (masked.image == 0).any()
    torch.testing.assert_close(result["loss"], task.loss(task.model(masked), masked)["loss"])
    assert not any(value.requires_grad for name, value in result.items() if name != "loss")


def test_tau_zero_is_the_baseline() -> None:
    batch = make_batch()
    task = calibrated(make_task(tau=0.0), batch)
    result = task(batch)
    assert result["masked_share"] == 0
    torch.testing.assert_close(result["loss"], task.loss(task.model(batch), batch)["loss"])


def test_calibration_reaches_the_papers_mean_score_and_persists() -> None:
    batch = make_batch()
    task = make_task()
    assert task.needs_calibration
    calibration = task.calibrate([batch, make_batch(seed=1)])
    assert abs(calibration.mean_score - 0.75) < 1e-3
    assert abs(task.score(batch).mean() - 0.75) < 0.05
    again = make_task()
    again.load_state_dict(task.state_dict())
    assert not again.needs_calibration
    assert again.calibrate([batch]) is None
    assert torch.equal(again.score(batch), task.score(batch))


def test_every_parameter_trains_under_every_level_and_preset() -> None:
    batch = make_batch()
    for options in ({}, {"preset": "released"}, {"level": "feature"}, {"level": "random"}, {"projection": "learnable"}):
        task = calibrated(make_task(**options), batch)
        check_param_groups(task, task.param_groups(1e-4, 0.01))
        task(batch)["loss"].backward()
        without = [name for name, p in task.named_parameters() if p.grad is None]
        assert not without, (options, without)


REJECTED = [
    ({"projection": "identity"}, r"256 \(visual\) and 128 \(text\)"),
    ({"projection": "cosine"}, r"projection=cosine compares features as they are.*256 \(visual\) and 128 \(text\)"),
    ({"projection": "learnable", "level": "random"}, "masked pixels"),
    ({"projection": "learnable", "features": "pred"}, "nothing to learn"),
    ({"level": "feature", "preset": "released"}, r"aml\.clean_loss_weight=0"),
    ({"stage1_size": 64, "preset": "released"}, "saves nothing"),
    ({"cache_scores": True}, "CARIS trains what is scored"),
    ({"cache_scores": True, "features": "late"}, r"aml\.features=early"),
    ({"tau": 1.5}, r"aml\.tau=1\.5"),
    ({"rho": -0.1}, r"aml\.rho=-0\.1"),
    ({"block": 0}, r"aml\.block=0"),
    ({"temperature": 0.0}, r"aml\.temperature=0\.0"),
    ({"clean_loss_weight": 1.0}, "--method supervised"),
    ({"preset": "papre"}, "did you mean paper"),
]


@pytest.mark.parametrize(("options", "message"), REJECTED, ids=str)
def test_what_cannot_work_is_rejected(options: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make_task(**options)


def test_the_models_limits_are_named() -> None:
    model = create_model("caris_tiny")
    loss = create_loss("weighted_cross_entropy")
    model.fused_dims, model.supports_suppression = None, False
    for options, message in (
        ({"features": "late"}, "features after fusion, which CARIS"),
        ({"level": "feature"}, "attention over visual positions, which CARIS"),
    ):
        with pytest.raises(UserError, match=message):
            build_method("aml", model, loss, AMLOptions(**options))
    model.alignment_texts = ()
    with pytest.raises(UserError, match=r"aml\.text=plain: CARIS has one kind only; remove"):
        build_method("aml", model, loss, AMLOptions(text="plain"))


@pytest.mark.parametrize("method", ["supervised", "aml"])
def test_a_loss_of_other_channels_is_rejected(method: str) -> None:
    for model, loss, fitting in (
        ("caris_tiny", "binary_cross_entropy", "CARIS gives 2; use weighted_cross_entropy, or"),
        ("cris_tiny", "weighted_cross_entropy", "CRIS gives 1; use binary_cross_entropy or cross_entropy_dice, or"),
        ("rela_tiny", "cgformer", "ReLA gives 2; use weighted_cross_entropy, or"),
    ):
        with pytest.raises(UserError, match=f"loss.name={loss} reads .-channel logits and {fitting}"):
            build_method(method, create_model(model), create_loss(loss))


def test_presets_can_be_overridden_field_by_field() -> None:
    task = make_task(preset="released", selection="patch", clean_loss_weight=0.0, rho=0.5)
    assert (task.masker.selection, task.clean_loss_weight, task.masker.rho, task.masker.tau) == ("patch", 0.0, 0.5, 0.4)
    assert task.scorer.score_padding


def test_a_fixed_temperature_is_not_calibrated_and_the_literal_one_warns() -> None:
    task = make_task(temperature=0.03)
    assert not task.needs_calibration
    assert task.scorer.temperature == pytest.approx(0.03)
    with pytest.warns(UserWarning, match="blanked"):
        make_task(temperature=1.0)


def test_calibration_needs_a_batch() -> None:
    with pytest.raises(UserError, match="at least one batch"):
        make_task().calibrate([])
