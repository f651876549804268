"""The table of memory: one row per model, with the figures of the estimate."""

import pytest

from amltrain.config.parse import checked
from amltrain.training.estimate import GIB, estimate
from benchmarks.command import main
from benchmarks.memory import BATCH, SHOWN


def test_a_row_is_the_estimate(capsys: pytest.CaptureFixture[str]) -> None:
    main(["memory", "caris_tiny"])
    head, _, row = capsys.readouterr().out.splitlines()
    cells = [cell.strip() for cell in row.strip("| ").split("|")]
    assert head.count("|") == row.count("|") == 6 + len(SHOWN)
    config = checked(["--model.name=caris_tiny", "--method=supervised", "--train.mixed_precision=bf16"])
    found = estimate(config)
    assert cells[0] == "`caris_tiny`" and cells[1] == f"{found.memory.at(BATCH) / GIB:.1f}"
    assert cells[-1] == f"{found.memory.most(139.8)} / {found.memory_checkpointed.most(139.8)}"


def test_an_unknown_model_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["memory", "caris_swim_base"])
    assert "did you mean caris_swin_base" in capsys.readouterr().err
