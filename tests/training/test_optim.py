"""Learning-rate schedules against the official code's recording and by hand."""

import json
import math
from pathlib import Path

import pytest
import torch

from amltrain.commands.train import read_run
from amltrain.errors import UserError
from amltrain.models import create_model
from amltrain.training.build import check_before_data
from amltrain.training.optim import average_weights, build_optimizer, epoch_factor, lr_factor, set_lr
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


def rates_by_epoch(config: str, epochs: int, groups: dict[str, float], *flags: str) -> dict[str, list[list[float]]]:
    """Every group's rate in the first, a middle and the last step of every epoch, by its base rate."""
    o, steps = read_run(["--config", config, *flags]).optim, 7
    parts = [{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": lr} for lr in groups.values()]
    optimizer = build_optimizer(parts, "adam", lr=o.lr, betas=o.betas, eps=o.eps, amsgrad=o.amsgrad)
    found: dict[str, list[list[float]]] = {name: [] for name in groups}
    for epoch in range(epochs):
        seen = []
        for step in (0, 3, steps - 1):
            factor = epoch_factor(
                epoch * steps + step,
                epochs * steps,
                steps,
                o.schedule,
                per_epoch=o.per_epoch,
                epoch_lag=o.epoch_lag,
                first_epochs=o.first_epochs,
                milestones=o.milestones,
                gamma=o.gamma,
                warmup_steps=o.warmup_steps,
            )
            set_lr(optimizer, factor, None, o.min_lr)
            seen.append([group["lr"] for group in optimizer.param_groups])
        for name, values in zip(groups, zip(*seen, strict=True), strict=True):
            found[name].append(list(values))
    return found


def test_c3vg_has_the_official_rates(shared_dir: Path) -> None:
    recorded = json.loads((shared_dir / "goldens/c3vg/lr_schedule.json").read_text())["lr"]
    ours = rates_by_epoch("models/c3vg_beit3_base", 30, {"vis_enc": 5e-5, "lan_enc": 5e-4, "rest": 5e-4})
    for column, name in enumerate(ours):
        expected = [[row[column]] * 3 for row in recorded]
        assert [v for e in ours[name] for v in e] == pytest.approx([v for e in expected for v in e], rel=1e-9)


@pytest.mark.parametrize(
    ("task", "flags"),
    [("grefcoco", []), ("refcoco", ["--optim.first_epochs", "[0.5]", "--optim.milestones", "[0.7, 0.9]"])],
)
def test_deris_has_the_official_rates(shared_dir: Path, task: str, flags: list[str]) -> None:
    recorded = json.loads((shared_dir / "goldens/deris/lr_schedule.json").read_text())[task]
    groups = {"vis_enc": 5e-5, "pixel_decoder": 1e-4, "rest": 1e-4}
    ours = rates_by_epoch("models/deris_b", recorded["config"]["max_epoch"], groups, *flags)
    for name in groups:
        assert [v for e in ours[name] for v in e] == pytest.approx([v for v in recorded[name] for _ in range(3)])


def test_remamber_has_the_official_rates() -> None:
    """Cosine to 1e-6 over 50 epochs, moved after each epoch by its number: the first two run at the full rate."""
    ours = rates_by_epoch("recipes/remamber/refcoco", 50, {"all": 5e-5, "tiny": 1e-7})
    for epoch, values in enumerate(ours["all"]):
        expected = 1e-6 + (5e-5 - 1e-6) * 0.5 * (1 + math.cos(math.pi * max(0, epoch - 1) / 50))
        assert values == pytest.approx([expected] * 3)
    assert ours["all"][0] == ours["all"][1] == [5e-5] * 3
    assert ours["tiny"][-1] == [1e-7] * 3


def test_schedules_that_cannot_be() -> None:
    flags = ["--config", "quickstart", "--optim.per_epoch", "true"]
    with pytest.raises(UserError, match=r"optim\.warmup_steps has no place; give optim\.first_epochs"):
        check_before_data(read_run([*flags, "--optim.warmup_steps", "5"]))
    with pytest.raises(UserError, match=r"optim\.epoch_lag belongs to optim\.per_epoch"):
        check_before_data(read_run(["--config", "quickstart", "--optim.epoch_lag", "1"]))


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
