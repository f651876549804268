"""Learning-rate schedules against the official code's recording and by hand."""

import json
from pathlib import Path

import pytest
import torch

from amltrain.models import create_model
from amltrain.training.optim import average_weights, build_optimizer, lr_factor, set_lr
from tests.models.test_registry import TINY, build


def test_poly_caris_is_the_releases(shared_dir: Path) -> None:
    recorded = json.loads((shared_dir / "goldens/caris/lr_schedule.json").read_text())["lr"]
    for step, lr in enumerate(recorded):
        assert 1e-4 * lr_factor(step, 100, "poly_caris", warmup_steps=10) == pytest.approx(lr, abs=1e-12)


def test_poly_ends_at_zero_and_never_rises() -> None:
    factors = [lr_factor(step, 50, "poly") for step in range(51)]
    assert factors[0] == 1.0
    assert factors[-1] == 0.0
    assert factors == sorted(factors, reverse=True)


def test_warmup_rises_to_the_schedule() -> None:
    factors = [lr_factor(step, 100, "constant", warmup_steps=4) for step in range(6)]
    assert factors == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


def test_multistep_and_cosine() -> None:
    steps = [lr_factor(step, 10, "multistep", milestones=[0.5, 0.8]) for step in (4, 5, 8)]
    assert steps == pytest.approx([1.0, 0.1, 0.01])
    assert lr_factor(5, 10, "cosine") == pytest.approx(0.5)
    assert lr_factor(10, 10, "cosine") == pytest.approx(0.0)


def test_groups_keep_their_ratio() -> None:
    slow, fast = torch.nn.Parameter(torch.zeros(1)), torch.nn.Parameter(torch.zeros(1))
    groups = [
        {"name": "slow", "params": [slow], "lr": 1e-5, "weight_decay": 0.0},
        {"name": "fast", "params": [fast], "lr": 1e-4, "weight_decay": 0.1},
    ]
    optimizer = build_optimizer(groups, "adamw", lr=1e-4, betas=(0.9, 0.999), eps=1e-8, amsgrad=False)
    set_lr(optimizer, 0.5)
    assert [group["lr"] for group in optimizer.param_groups] == [5e-6, 5e-5]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.0, 0.1]


def test_cris_starts_at_its_releases_rates() -> None:
    """CLIP and the rest, epoch by epoch."""
    groups = create_model("cris_tiny").param_groups(1e-4, 0.0)
    optimizer = build_optimizer(groups, "adam", lr=1e-4, betas=(0.9, 0.999), eps=1e-8, amsgrad=False)
    rates = []
    for epoch in range(50):
        factor = lr_factor(epoch, 50, "multistep", milestones=[0.7])
        set_lr(optimizer, factor, 1e-4 if epoch == 0 else None)
        rates.append(tuple(group["lr"] for group in optimizer.param_groups))
    expected = [(1e-4, 1e-4)] + 34 * [(1e-5, 1e-4)] + 15 * [(1e-6, 1e-5)]
    assert [rate for pair in rates for rate in pair] == pytest.approx([rate for pair in expected for rate in pair])


@pytest.mark.parametrize("decay", [0.9999, 0.5])
@pytest.mark.parametrize("name", TINY)
def test_the_average_of_constant_weights_is_the_model(name: str, decay: float) -> None:
    """Bit for bit, tables of indices included."""
    model = build(name)
    average = average_weights(model, decay)
    for _ in range(3):
        average.update_parameters(model)
    averaged, weights = average.module.state_dict(keep_vars=True), model.state_dict(keep_vars=True)
    buffers = dict(average.module.named_buffers())
    assert averaged.keys() == weights.keys()
    assert all(torch.equal(averaged[key], weights[key]) for key in weights)
    assert all(torch.equal(buffers[key], buffer) for key, buffer in model.named_buffers())


@pytest.mark.parametrize("decay", [0.9, 0.5])
def test_the_average_follows_weights_and_copies_counts(decay: float) -> None:
    model = torch.nn.BatchNorm1d(3)
    average = average_weights(model, decay)
    average.update_parameters(model)
    expected = model.weight.detach().clone()
    for step in range(1, 4):
        with torch.no_grad():
            model.weight.fill_(10.0 * step)
            model.num_batches_tracked.fill_(step)
        average.update_parameters(model)
        expected = decay * expected + (1 - decay) * model.weight.detach()
    assert torch.allclose(average.module.weight, expected)
    assert int(average.module.num_batches_tracked) == 3 == int(average.n_averaged) - 1
