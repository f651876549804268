"""The table of memory: one row per model, with the figures of the estimate."""

import pytest

from amltrain.config.parse import checked
from amltrain.training.estimate import GIB, step_cost
from benchmarks.command import main
from benchmarks.memory import BATCH, SHOWN


@pytest.mark.slow
def test_a_row_is_the_estimate(capsys: pytest.CaptureFixture[str]) -> None:
    main(["memory", "beit3_tiny"])
    head, _, row = capsys.readouterr().out.splitlines()
    cells = [cell.strip() for cell in row.strip("| ").split("|")]
    assert head.count("|") == row.count("|") == 6 + len(SHOWN)
    cost = step_cost(checked(["--model.name=beit3_tiny", "--method=supervised", "--train.mixed_precision=bf16"]), BATCH)
    assert cells[0] == "`beit3_tiny`" and float(cells[1]) == pytest.approx(cost.peak / GIB, abs=0.06)
    assert cells[4] == f"{cost.launches:,}" and all(int(most) > 100 for most in cells[-1].split(" / "))


def test_an_unknown_model_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["memory", "caris_swim_base"])
    assert "did you mean caris_swin_base" in capsys.readouterr().err
