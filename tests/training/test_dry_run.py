"""`train.dry_run`: one step for real, and nothing left."""

from pathlib import Path

import pytest

from amltrain.errors import UserError
from tests.training import runs


def test_a_dry_run_trains_a_step_and_names_no_folder(
    shapes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs.run(shapes, tmp_path / "run", "--train.dry_run", "true")
    said = capsys.readouterr()
    printed = said.out + said.err
    assert "done: 1 steps" in printed and "output     none: train.dry_run keeps nothing" in printed
    assert "amltrain-dry-run" not in printed and str(tmp_path) not in printed.replace(str(shapes), "")
    assert not list(tmp_path.iterdir())


def test_a_dry_run_of_data_that_is_not_prepared_is_rejected(tmp_path: Path) -> None:
    (tmp_path / "prepared").mkdir()
    with pytest.raises(UserError, match=r"refshapes: not prepared in .*, and train.dry_run writes nothing"):
        runs.run(tmp_path / "prepared", tmp_path / "run", "--train.dry_run", "true")
    assert not (tmp_path / "run").exists()


def test_an_unknown_split_is_rejected_before_scenes_are_drawn(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no split 'vall' \(evaluation.splits\); there are refshapes: train, val"):
        runs.run(tmp_path / "prepared", tmp_path / "run", "--evaluation.splits", "[vall]")
    assert not list(tmp_path.iterdir())
