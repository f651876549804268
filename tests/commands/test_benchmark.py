"""The benchmark measures what it says, on the smallest model."""

import pytest
import torch

from amltrain.commands.benchmark import Timing, build_bench, main, stage_one_clock, summarise
from tests.test_tasks import make_batch, make_task


def test_ratios_are_medians_of_rounds() -> None:
    baseline = [Timing((0.0, 1.0, 2.0, 1.0)), Timing((0.0, 2.0, 4.0, 2.0)), Timing((0.0, 1.0, 2.0, 1.0))]
    own = [Timing((1.0, 1.0, 2.0, 1.0)), Timing((2.0, 2.0, 4.0, 2.0)), Timing((5.0, 5.0, 5.0, 5.0))]
    result = summarise("own", own, baseline, None)
    assert result.seconds == 10.0
    assert result.ratio == 1.25  # of 1.25, 1.25 and 5: one slow step of ours does not count
    assert result.shares == pytest.approx((2 / 10, 2 / 10, 4 / 10, 2 / 10))


def test_stage_one_is_timed_and_restored() -> None:
    ticks = iter(range(100))
    task = make_task(temperature=0.02)
    with stage_one_clock(task, lambda: float(next(ticks))) as seconds:
        task(make_batch())
    assert seconds == [3.0]  # scores, blocks and masking, one tick each
    assert "score" not in vars(task)


def test_contenders_share_a_model_and_differ_in_work(capsys: pytest.CaptureFixture) -> None:
    bench = build_bench(
        "caris_tiny", batch=1, size=64, stage1_size=None, precision="bf16", device=torch.device("cpu"), only=["paper"]
    )
    assert list(bench.tasks) == ["baseline", "paper", "paper, stage1_size 32"]
    assert len({id(task.model) for task in bench.tasks.values()}) == 1
    baseline, paper, _ = bench.run(rounds=1)
    assert baseline.ratio == 1.0
    assert baseline.shares[0] == 0
    assert 0 < paper.shares[0] < 0.6
    assert sum(paper.shares) == pytest.approx(1)


def test_bad_numbers_are_one_line(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        main(["--batch", "0"])
    assert "error: --batch and --rounds must be at least 1" in capsys.readouterr().err
