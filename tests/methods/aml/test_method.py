"""AML around a real tiny CARIS: what it returns, what it trains, what it repeats, what it rejects."""

import pytest
import torch

from amltrain.data.augment import BACKGROUND, OTHER, REFERENT
from amltrain.errors import UserError
from amltrain.losses import create_loss, upsample_logits
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
    regions = torch.where(target == 255, REFERENT, BACKGROUND).to(torch.uint8)
    regions[:, 70:90, 70:90] = OTHER
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
        regions=regions,
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
    ({"share": 1.2}, r"aml\.share=1\.2"),
    ({"dynamic_tau": -1.0}, r"aml\.dynamic_tau=-1\.0"),
    ({"share": 0.2, "dynamic_tau": 0.5}, r"remove aml\.random_shares and aml\.dynamic_tau"),
    ({"share": 0.2, "level": "random", "random_shares": (0.2,)}, r"remove aml\.random_shares"),
    ({"oracle": "background_first"}, r"aml\.oracle belongs to aml\.features=oracle, not early"),
    ({"loss_weights": "scores"}, r"aml\.loss_weights belongs to aml\.level=loss, not image"),
    ({"loss_weights": "scores", "level": "loss", "share": 0.2}, r"aml\.share has no effect"),
    ({"level": "loss", "preset": "released"}, r"aml\.clean_loss_weight=0"),
    ({"features": "oracle", "projection": "grounded"}, "nothing to learn"),
    ({"features": "oracle", "projection": "learnable"}, "nothing to learn"),
    ({"features": "oracle", "dynamic_tau": 0.5}, "does not make"),
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


def test_level_loss_leaves_the_weak_blocks_out_of_the_loss_and_the_image_whole() -> None:
    batch = make_batch()
    task = calibrated(make_task(tau=0.6, level="loss"), batch)
    result = task(batch)
    blocks = task.blocks(task.score(batch), batch)
    assert 0 < result["masked_share"] == blocks.float().mean() < 1
    output = task.model(batch)
    kept = ~blocks.repeat_interleave(32, 1).repeat_interleave(32, 2)[:, :96, :96]
    logits = upsample_logits(output.logits, (96, 96))
    truth = (batch.target >= 128).long()
    weight = task.loss.weight
    each = torch.nn.functional.cross_entropy(logits, truth, weight, reduction="none")
    torch.testing.assert_close(result["loss"], each[kept].sum() / weight[truth][kept].sum())


def test_soft_weights_are_the_scores() -> None:
    batch = make_batch()
    task = calibrated(make_task(level="loss", loss_weights="scores"), batch)
    weights = task.loss_weights(torch.zeros(2, 3, 3, dtype=torch.bool), task.score(batch), batch)
    assert weights.shape == (2, 96, 96) and 0 < weights.min() < weights.max() <= 1
    weighed = task.loss(task.model(batch), batch._replace(loss_weight=weights))["loss"]
    torch.testing.assert_close(task(batch)["loss"], weighed)


def test_a_loss_that_cannot_leave_pixels_out_is_rejected() -> None:
    class Whole(torch.nn.Module):
        def forward(self, output, batch):
            return {"loss": output.logits.mean()}

    with pytest.raises(UserError, match=r"aml\.level=loss leaves pixels out of the loss, and Whole cannot"):
        build_method("aml", create_model("caris_tiny"), Whole(), AMLOptions(level="loss"))


def test_a_share_is_kept_exactly_whatever_the_scores() -> None:
    batch = make_batch()
    for options in ({}, {"level": "random"}, {"features": "oracle"}, {"tau": 0.0}, {"projection_seed": 3}):
        task = calibrated(make_task(share=0.34, **options), batch)
        assert torch.equal(task.blocks(task.score(batch), batch).flatten(1).sum(1), torch.tensor([3, 3]))
    lowest = calibrated(make_task(share=0.34), batch)
    scores = lowest.score(batch)
    blocks = lowest.blocks(scores, batch)
    means = torch.nn.functional.adaptive_avg_pool2d(scores[:, None], (3, 3))[:, 0]
    assert all(means[i][blocks[i]].max() <= means[i][~blocks[i]].min() for i in range(2))


ORACLE = {
    "referent_kept": (0.0, 0.0),
    "background_first": (0.0, 0.5),
    "distractors_first": (0.5, 0.0),
}


@pytest.mark.parametrize("order", ORACLE)
def test_the_oracle_knows_the_referent_and_the_others(order: str) -> None:
    batch = make_batch()
    task = make_task(features="oracle", oracle=order, share=0.3)
    scores = task.score(batch)[0]
    background, other = ORACLE[order]
    referent = torch.tensor([[1, 1, 1], [1, 1, 1], [0, 0, 0]], dtype=torch.bool)  # rows 10..49, columns 20..69
    assert torch.equal(scores == 1, referent)
    assert scores[2, 0] == scores[2, 1] == background and scores[2, 2] == other
    blocks = task.blocks(task.score(batch), batch)[0]
    assert blocks.sum() == 3 and not (blocks & referent).any()
    few = make_task(features="oracle", oracle=order, share=0.1).blocks(task.score(batch), batch)[0]
    if order == "background_first":
        assert not few[2, 2]
    if order == "distractors_first":
        assert few[2, 2]
    assert task.needs_regions and not make_task().needs_regions


def test_the_oracle_wants_data_with_the_truth() -> None:
    with pytest.raises(UserError, match="only training data has"):
        make_task(features="oracle")(make_batch()._replace(regions=None))


def test_a_dynamic_threshold_is_the_stated_formula() -> None:
    batch = make_batch()
    task = calibrated(make_task(dynamic_tau=0.8, tau=0.6), batch)
    factors = task.masker.factors(task.model, batch)
    with torch.no_grad():
        task.model.eval()
        p = task.model(batch).logits.softmax(1)[:, 1]
        task.model.train()
    known = (2 * p - 1).abs().flatten(1).mean(1)
    length = torch.tensor([1.0, 5 / 8])
    torch.testing.assert_close(factors.flatten(), 1 + 0.8 * (known + length - 1))
    assert calibrated(make_task(), batch).masker.factors(task.model, batch) is None
    scores = task.score(batch)
    assert torch.equal(task.blocks(scores, batch, torch.zeros(2, 1, 1)), torch.zeros(2, 3, 3, dtype=torch.bool))
