"""The scores that can know the sentence: a projection trained on the ground truth, and an averaged prediction."""

import pytest
import torch

from amltrain.errors import UserError
from amltrain.methods.aml.recorder import referent_auc
from amltrain.methods.aml.scorers import GROUNDING_SCALE, GroundedProjection, PredictionScorer, grounding_loss
from amltrain.records import AlignmentFeatures
from tests.methods.aml.test_method import make_task
from tests.methods.aml.test_step import toy_batch, toy_task


def planted(count: int, seed: int, meaning: torch.Tensor) -> tuple[AlignmentFeatures, torch.Tensor]:
    """Features of images in which one of four patches is what the sentence means, as `meaning` [C_v, C_t] has it."""
    generator = torch.Generator().manual_seed(seed)
    text = torch.randn(count, 3, meaning.shape[1], generator=generator)
    visual = torch.randn(count, meaning.shape[0], 2, 2, generator=generator)
    visual[:, :, 0, 1] += text.mean(1) @ meaning.T
    target = torch.zeros(count, 4, 4, dtype=torch.uint8)
    target[:, :2, 2:] = 255
    return AlignmentFeatures(visual, text, torch.ones(count, 3, dtype=torch.bool)), target


def auc(projection: GroundedProjection, features: AlignmentFeatures, target: torch.Tensor) -> float:
    total, number = referent_auc(projection(features), target.float() / 255, (2, 2))
    return (total / number).item()


def test_it_learns_what_a_sentence_means_and_needs_the_sentence() -> None:
    meaning = torch.randn(24, 16, generator=torch.Generator().manual_seed(5))
    projection = GroundedProjection(24, 16, dim=32)
    features, target = planted(256, 0, meaning)
    unseen, unseen_target = planted(128, 1, meaning)
    assert abs(auc(projection, unseen, unseen_target) - 0.5) < 0.15
    optimizer = torch.optim.Adam(projection.parameters(), lr=1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        grounding_loss(projection(features), target).backward()
        optimizer.step()
    assert auc(projection, unseen, unseen_target) > 0.85
    others = unseen._replace(text=unseen.text.roll(1, 0))
    assert auc(projection, others, unseen_target) < 0.65


def test_the_loss_by_hand_weighs_both_sides_alike() -> None:
    target = torch.zeros(1, 2, 2, dtype=torch.uint8)
    target[0, 0, 0] = 255
    scores = torch.tensor([[[0.8, 0.5], [0.25, 0.1]]])
    hit, miss = torch.tensor(0.8).log(), (1 - torch.tensor([0.5, 0.25, 0.1])).log().mean()
    torch.testing.assert_close(grounding_loss(scores, target), -(hit + miss) / 2)
    assert grounding_loss(scores, target * 0).isfinite()  # a sentence that means nothing in the image


@pytest.mark.parametrize(
    "options", [{}, {"features": "late"}, {"level": "feature"}, {"clean_loss_weight": 0.5}], ids=str
)
def test_the_model_does_not_notice_it(options: dict) -> None:
    """Same loss, same gradient of the model; the projection learns although nothing is masked."""
    batch = toy_batch()
    plain, grounded = (
        toy_task(tau=0.0, temperature=0.02, **options),
        toy_task(projection="grounded", tau=0.0, **options),
    )
    assert [g["name"] for g in grounded.param_groups(1e-3, 0.01)] == ["all", "aml_projection"]
    ours, theirs = grounded(batch), plain(batch)
    assert torch.equal(ours["loss"], theirs["loss"])
    ours["loss"].backward()
    theirs["loss"].backward()
    for (name, one), (_, two) in zip(grounded.model.named_parameters(), plain.model.named_parameters(), strict=True):
        assert torch.equal(one.grad, two.grad), name
    own = [p.grad.norm() for p in grounded.masker.parameters()]
    assert all(0 < norm < 10 * GROUNDING_SCALE for norm in own)


def test_scores_are_computed_in_float32_under_autocast() -> None:
    task, batch = toy_task(projection="grounded", diagnostics_every=1), toy_batch()
    with torch.autocast("cpu", torch.bfloat16):
        result = task(batch)
    assert result["scores"].dtype == torch.float32
    result["loss"].backward()
    assert all(p.grad.isfinite().all() for p in task.masker.parameters())


def test_an_averaged_prediction_follows_the_model() -> None:
    task, batch = toy_task(features="pred", score_decay=0.75, selection="patch"), toy_batch()
    scorer = task.scorer
    assert isinstance(scorer, PredictionScorer) and scorer.average is not None
    assert task.before_step_needs_weights
    start = {name: p.detach().clone() for name, p in task.model.named_parameters()}
    assert torch.equal(task.score(batch), toy_task(features="pred").score(batch))
    task(batch)["loss"].backward()
    assert all(p.grad is None for p in scorer.parameters())
    assert {g["name"] for g in task.param_groups(1e-3, 0.0)} == {"all"}
    with torch.no_grad():
        for parameter in task.model.parameters():
            parameter += 1
    task.before_step(0, [batch])  # nothing has been trained yet
    for name, parameter in scorer.average.named_parameters():
        assert torch.equal(parameter, start[name])
    task.before_step(1, [batch])
    task.before_step(1, [batch])  # a run that stopped inside step 1 does it again
    for name, parameter in scorer.average.named_parameters():
        torch.testing.assert_close(parameter, start[name] + 0.25)
    for ours, theirs in zip(scorer.average.buffers(), task.model.buffers(), strict=True):
        assert torch.equal(ours, theirs)
    again = toy_task(features="pred", score_decay=0.75, selection="patch")
    again.load_state_dict(task.state_dict())  # as a resumed run does
    assert torch.equal(again.score(batch), task.score(batch))


REJECTED = [
    ({"projection": "grounded", "features": "pred"}, "nothing to learn"),
    ({"projection": "grounded", "cache_scores": True}, r"aml\.projection=grounded changes them"),
    ({"score_decay": 0.9}, r"aml\.score_decay belongs to aml\.features=pred, not early"),
    ({"score_decay": 1.0, "features": "pred"}, r"aml\.score_decay=1\.0 must be at least 0 and below 1"),
    ({"random_shares": [0.1]}, r"aml\.random_shares belongs to aml\.level=random, not image"),
    ({"random_shares": [0.1, 1.5], "level": "random"}, r"aml\.random_shares: 1\.5 is not a share"),
]


@pytest.mark.parametrize(("options", "message"), REJECTED, ids=str)
def test_what_cannot_work_is_rejected(options: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make_task(**options)
