"""`train.stop_after` trains the start of a longer run; epoch means of the loss and the untrained model are kept."""

from pathlib import Path

import numpy as np
import pytest

from amltrain.errors import UserError
from amltrain.run_folder import FINISHED_FILE, checkpoints, step_of
from tests.training import runs


def epoch_losses(output: Path) -> dict[int, float]:
    return {line["step"]: line["epoch_loss"] for line in runs.log(output) if "epoch_loss" in line}


def test_it_is_the_start_of_the_whole_run_and_continues(shapes: Path, tmp_path: Path, whole: Path) -> None:
    one = tmp_path / "one"
    runs.run(shapes, one, "--train.stop_after", "4", "--checkpoint.initial", "true")
    assert [step_of(path) for path in checkpoints(one)] == [0, 2, 4]
    assert (one / FINISHED_FILE).is_file()
    assert runs.losses(one) == runs.losses(whole)[:4]  # the schedule is that of 8 steps
    short, start = runs.weights(one), runs.weights(whole, "step-000004")
    assert all((short[name] == start[name]).all() for name in start)
    assert not all((short[name] == value).all() for name, value in runs.weights(one, "step-000000").items())
    runs.run(shapes, one)
    assert runs.same_weights(one, whole)
    assert epoch_losses(one) == epoch_losses(whole)


def test_every_epoch_logs_the_mean_of_its_losses(whole: Path) -> None:
    """The short run logs every step, so the means can be checked; `whole` has at least one complete epoch."""
    found, losses = epoch_losses(whole), runs.losses(whole)
    assert found
    for last, mean in found.items():
        steps = min(found)
        assert mean == pytest.approx(np.mean(losses[last - steps : last]), rel=1e-9)


def test_a_run_cannot_stop_after_its_end(shapes: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"train\.stop_after is 9 and must lie between 1 and 8"):
        runs.run(shapes, tmp_path, "--train.stop_after", "9")
    with pytest.raises(UserError, match=r"train\.stop_after is 3 and must lie between 1 and 2"):
        runs.run(shapes, tmp_path, "--train.max_steps", "null", "--train.epochs", "2", "--train.stop_after", "3")


def test_epochs_are_counted_in_epochs(shapes: Path, tmp_path: Path) -> None:
    by_epochs = ("--train.max_steps", "null", "--train.epochs", "50", "--train.stop_after", "1")
    runs.run(shapes, tmp_path, *by_epochs, "--method", "supervised")
    steps = len(runs.losses(tmp_path))
    assert list(epoch_losses(tmp_path)) == [steps] == [8]  # 60 referents in batches of 8
    assert [line["lr_factor"] for line in runs.log(tmp_path) if "lr_factor" in line][-1] > 0.95  # of 50 epochs
