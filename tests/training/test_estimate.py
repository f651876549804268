"""What a run is said to cost, held against the allocator of a simulated card and against arithmetic by hand."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from amltrain.choices import BASES, Base
from amltrain.commands.train import main
from amltrain.config.parse import checked
from amltrain.config.schema import RunConfig
from amltrain.data.transforms import prepare_batch
from amltrain.errors import UserError
from amltrain.losses import create_loss
from amltrain.models import create_model, model_info
from amltrain.training.estimate import (
    CARDS,
    GIB,
    RESERVE,
    Estimate,
    Meter,
    blank_batch,
    describe,
    estimate,
    memory_line,
    step_cost,
    training_samples,
)
from tests.models.test_registry import TINY
from tests.null_gpu.budgets import FULL_SIZE, read_budgets

BUDGETS = read_budgets()


def run(name: str, *flags: str, method: str = "supervised") -> RunConfig:
    return checked([f"--model.name={name}", f"--method={method}", "--train.mixed_precision=bf16", *flags])


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in FULL_SIZE if name != "detris_base"]
SMALL = "beit3_tiny"
"""The model with the fewest operations."""


@pytest.fixture(scope="module")
def found() -> Estimate:
    return estimate(run(SMALL))


@pytest.mark.parametrize("name", ["detris_base", *SLOW])
def test_memory_and_launches_are_those_of_a_card(name: str) -> None:
    """Within 15 % of what torch's CUDA allocator held and what was launched, clipping and optimizer included."""
    cost, budget = step_cost(run(name), 2), BUDGETS[name, "supervised"]
    assert cost.peak / 2**20 == pytest.approx(budget["peak"], rel=0.15)
    assert cost.launches == pytest.approx(budget["kernels"], rel=0.15)


@pytest.mark.parametrize("name", TINY)
def test_every_model_can_be_estimated(name: str) -> None:
    cost = step_cost(run(name), 2)
    assert cost.weights > 0 and cost.flops > 0 and cost.launches > 100
    assert cost.peak > cost.weights + cost.states


def test_a_step_by_hand() -> None:
    """A product of [8, 64] with [64, 32]: three products in all, and every tensor's bytes in blocks of 512."""
    layer = nn.Linear(64, 32, bias=False)
    x = torch.randn(8, 64, requires_grad=True)
    with Meter() as meter:
        meter.add(layer.weight)
        assert meter.live == 64 * 32 * 4
        y = layer(x)
        assert meter.live == 64 * 32 * 4 + 8 * 32 * 4
        y.sum().backward()
        del y
    assert meter.flops == 3 * 2 * 8 * 64 * 32
    assert meter.live >= 2 * 64 * 32 * 4  # weight and its gradient


def test_what_moves_the_memory() -> None:
    plain = step_cost(run(SMALL), 4)
    again = step_cost(run(SMALL, "--model.gradient_checkpointing=true"), 4)
    gathered = step_cost(run(SMALL), 4, accumulated=True)
    single = step_cost(run(SMALL, "--train.mixed_precision=no"), 4)
    double = step_cost(run(SMALL), 8)
    assert again.peak < plain.peak and again.flops > plain.flops
    assert gathered.peak > plain.peak and gathered.flops == plain.flops
    assert single.peak > plain.peak
    assert double.flops == pytest.approx(2 * plain.flops, rel=0.01) and double.weights == plain.weights


def test_methods_cost_what_they_do() -> None:
    """AML scores with one forward pass more, a third of a step; MaskRIS trains on two pictures."""
    costs = {
        method: step_cost(run("caris_tiny", method=method), 2).flops for method in ("supervised", "aml", "maskris")
    }
    assert 1.05 < costs["aml"] / costs["supervised"] < 1.4
    assert 1.8 < costs["maskris"] / costs["supervised"] < 2.2


@pytest.mark.slow
def test_an_average_of_the_weights_takes_its_place(found: Estimate) -> None:
    averaged = estimate(run(SMALL, "--train.ema_decay=0.999"))
    assert averaged.average == averaged.step.weights
    assert averaged.memory.fixed - found.memory.fixed == pytest.approx(averaged.average)


def test_what_fits_is_where_the_line_crosses(found: Estimate) -> None:
    for card in CARDS:
        most = found.memory.most(card.gib)
        assert found.memory.at(most) <= card.gib * GIB * (1 - RESERVE) < found.memory.at(most + 1)
    assert found.memory.most(0.0) == 0
    cost = step_cost(run(SMALL), 50)  # a size that was not measured for the line
    assert found.memory.at(50) == pytest.approx(cost.peak, rel=0.03)


def test_a_line_is_measured_where_samples_fill_the_memory() -> None:
    """Bytes that are 1000 in the optimizer, whatever the batch, and 100 + 3 per sample before it."""
    asked: list[int] = []

    def peaks(samples: int) -> int:
        asked.append(samples)
        return max(1000, 100 + 3 * samples)

    line = memory_line(peaks, 16)
    assert (line.fixed, line.each, line.least) == (100, 3, 1000)
    assert line.at(16) == 1000 and line.at(500) == 1600 and max(asked) <= 2048
    assert line.most(1001 / GIB / (1 - RESERVE)) == 300 and line.most(999 / GIB / (1 - RESERVE)) == 0
    assert memory_line(lambda samples: 100 + 3 * samples, 16).least == 0


def test_samples_are_those_of_the_data_or_of_the_paper(tmp_path: Path) -> None:
    published = run("caris_tiny", '--data.datasets=["refcoco","refcoco+"]')
    assert training_samples(published) == 42404 + 42278
    sentences = replace(published, data=replace(published.data, train_unit="sentence"))
    assert training_samples(sentences) == 120624 + 120191
    unknown = run("caris_tiny", '--data.datasets=["refcoco","refshapes"]', f"--data.prepared={tmp_path}")
    assert training_samples(unknown) is None


def test_the_screen(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--data.datasets=[refcoco]", "--train.max_steps=null", "--train.epochs=10", "--train.global_batch_size=16"]
    main(["--estimate", "--processes", "4", "--model.name", SMALL, "--train.mixed_precision=bf16", *flags])
    told = capsys.readouterr().out
    assert "batch       16 = 4 processes x 4 x 1 accumulated, 26,502 steps" in told
    assert all(card.name in told for card in CARDS)
    assert "neither was measured on a card" in told


def test_what_cannot_work_is_said_as_for_a_run(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["--estimate", "--processes", "3", "--train.global_batch_size=16"])
    assert exit_.value.code == 2 and "is not a multiple of 3 processes" in capsys.readouterr().err


def test_unknown_hours_are_a_dash(found: Estimate) -> None:
    unknown = found._replace(steps=None)
    assert unknown.hours(CARDS[0], "bf16") is None
    rows: Sequence[str] = [line for line in describe(run(SMALL), unknown).splitlines() if line.startswith("| ")]
    assert [row.split("|")[4].strip() for row in rows[2:]] == ["-"] * len(CARDS)


@pytest.mark.parametrize("name", TINY)
def test_a_blank_batch_is_what_the_model_reads(name: str) -> None:
    """With values, and at the protocol's own size, as a loader would give it."""
    info = model_info(name)
    batch = blank_batch(info.preprocess, 2)
    torch.manual_seed(0)
    model = create_model(name).train()
    loss = create_loss(info.loss, **info.loss_kwargs)(model(batch), batch)["loss"]
    assert torch.isfinite(loss)
    raw = batch._replace(image=batch.image.to(torch.uint8))
    assert prepare_batch(raw, info.preprocess.normalization).image.shape == batch.image.shape


def test_a_model_that_reads_values_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from amltrain.models.caris import CARIS

    forward = CARIS.decode

    def reads(self: CARIS, features: object, batch: object) -> object:
        assert float(batch.image.sum()) < 1e30  # type: ignore[attr-defined]
        return forward(self, features, batch)  # type: ignore[arg-type]

    monkeypatch.setattr(CARIS, "decode", reads)
    with pytest.raises(UserError, match="caris_tiny with method supervised cannot be estimated: it reads values"):
        step_cost(run("caris_tiny"), 2)


@pytest.mark.slow
@pytest.mark.parametrize("base", [base for base in BASES if base.card is not None], ids=lambda base: base.name)
def test_finetune_counts_with_these_figures(base: Base) -> None:
    flags = [f"--preprocess.size={base.sizes[-1]}", f"--model.kwargs={json.dumps(dict(base.kwargs))}"]
    small, large = (step_cost(run(base.name, *flags), rows).peak / GIB for rows in (2, 8))
    each = (large - small) / 6
    assert base.sample == pytest.approx(each, rel=0.05)
    assert base.fixed == pytest.approx(small - 2 * each, rel=0.1)
