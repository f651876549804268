"""The benchmark measures what it says, on the smallest model."""

import pytest
import torch

from benchmarks import sentences as benchmark_sentences
from benchmarks.command import main
from benchmarks.steps import Contender, Timing, build_bench, contenders, count_flops, stage_one_clock, summarise
from tests.methods.aml.test_method import make_batch, make_task


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
    configs = contenders(64)
    assert list(configs) == ["baseline", "paper", "paper, stage1_size 32", "released"]
    del configs["released"]
    bench = build_bench("caris_tiny", configs, batch=1, size=64, precision="bf16", device=torch.device("cpu"))
    assert len({id(task.model) for task in bench.tasks.values()}) == 1
    baseline, paper, _ = bench.run(rounds=1)
    assert baseline.ratio == 1.0
    assert baseline.shares[0] == 0
    assert 0 < paper.shares[0] < 0.6
    assert sum(paper.shares) == pytest.approx(1)


@pytest.mark.slow
def test_flops_of_full_size_caris() -> None:
    """The floor that the timed ratios stand on: encoders without gradient are 17.5 % of a step."""
    flops = count_flops("caris_swin_base", 448, contenders(448))
    baseline, paper, small, released = flops.values()
    assert baseline == pytest.approx(730.4e9, rel=0.005)
    assert paper / baseline == pytest.approx(1.175, abs=0.001)
    assert small / baseline < 1.06
    assert released / baseline < 2.0


def test_half_precision_scales_the_loss_and_still_steps() -> None:
    configs = {"baseline": Contender("supervised"), "paper": Contender("aml")}
    bench = build_bench("caris_tiny", configs, batch=2, size=64, precision="fp16", device=torch.device("cpu"))
    before = [p.clone() for p in bench.tasks["paper"].model.parameters()]
    bench.step(bench.tasks["paper"])
    assert bench.scaler.get_scale() == 1024.0  # nothing overflowed
    assert not all(map(torch.equal, before, bench.tasks["paper"].model.parameters()))


def test_a_model_that_cannot_train_on_one_sample(capsys: pytest.CaptureFixture) -> None:
    flops = count_flops("cris_tiny", 96, {"baseline": Contender("supervised"), "paper": Contender("aml")})
    assert 0.1e9 < flops["baseline"] < flops["paper"] < 1.5 * flops["baseline"] < 15e9
    with pytest.raises(SystemExit):
        main(["--model", "cris_tiny", "--batch", "1", "--rounds", "1", "--warmup", "0"])
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: CRIS normalises the sentence over the images of a micro batch")


@pytest.mark.parametrize(
    ("flag", "value", "message"),
    [
        ("--batch", "0", "--batch is 0, but must be at least 1"),
        ("--rounds", "-1", "--rounds is -1, but must be at least 1"),
        ("--size", "0", "--size is 0, but must be at least 2"),
        ("--stage1-size", "0", "--stage1-size is 0, but must be at least 1"),
        ("--threads", "0", "--threads is 0, but must be at least 1"),
        ("--warmup", "-1", "--warmup is -1, but must be at least 0"),
        ("--device", "foo", "there is no device foo here"),
    ],
)
def test_bad_options_are_one_line(capsys: pytest.CaptureFixture, flag: str, value: str, message: str) -> None:
    with pytest.raises(SystemExit):
        main([flag, value])
    assert capsys.readouterr().err.startswith(f"error: {message}")


def test_sentences_that_share_an_image(capsys: pytest.CaptureFixture) -> None:
    benchmark_sentences.main(["--models", "cris_tiny", "beit3_tiny", "--sentences", "3", "--rounds", "1"])
    rows = [line.split("|")[1:-1] for line in capsys.readouterr().out.splitlines() if "_tiny" in line]
    cris, beit3 = ([cell.strip() for cell in row] for row in rows)
    assert float(cris[4]) > 1.1  # of the FLOPs
    assert float(beit3[4]) == 1  # it reads the words from the first block on
    assert float(cris[8]) < 1e-5
    with pytest.raises(SystemExit):
        benchmark_sentences.main(["--models", "cris_tinny"])
    assert "did you mean cris_tiny" in capsys.readouterr().err
