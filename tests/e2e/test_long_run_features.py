"""What a long run over several data sets needs, on runs of a few steps: sampling shares, validation of every data set,
the best checkpoint by a named metric, weights averaged, early stopping, a time limit."""

import json
from pathlib import Path

import numpy as np
import pytest

from amltrain import run_folder as checkpoints
from amltrain.commands.evaluate import main as evaluate
from amltrain.data.prepare import prepare
from amltrain.data.sources.shapes import SPLIT_SIZES, write_refshapes
from amltrain.errors import UserError
from amltrain.training.trainer import Trainer
from tests.training import runs

NAMES = ("refshapes", "refshapes+")
STEPS = 6
LONG_RUN = (
    *("--data.datasets", "[refshapes, refshapes+]", "--data.weights", "[3, 1]", "--data.workers", "1"),
    *("--train.max_steps", str(STEPS), "--train.ema_decay", "0.5", "--evaluation.every_steps", "2"),
    *("--evaluation.best_metric", "refshapes+:val/mIoU", "--checkpoint.every_steps", "100"),
)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two data sets over scenes of their own, the first one larger."""
    root = tmp_path_factory.mktemp("two")
    for seed, name in enumerate(NAMES):
        sizes = dict.fromkeys(SPLIT_SIZES, 2) | {"train": 9 - 3 * seed, "val": 4}
        write_refshapes(root / name, name, split_sizes=sizes, size=64, seed=seed, progress=False)
        prepare(name, root / name, root / "prepared", progress=False)
    return root / "prepared"


class Seen:
    """Notes what every optimizer step of the runs in this process is given, [step][sample] ids."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.ids: list[list[int]] = []
        self.sizes: list[int] = []
        step = Trainer._optimizer_step

        def noted(trainer: Trainer, batches: list):
            self.sizes = trainer.run.components.dataset.split_sizes
            self.ids.append([i for batch in batches for i in batch.sample_id.tolist()])
            return step(trainer, batches)

        monkeypatch.setattr(Trainer, "_optimizer_step", noted)


@pytest.fixture(scope="module")
def long_run(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Seen]:
    """An uninterrupted run."""
    output = tmp_path_factory.mktemp("long")
    with pytest.MonkeyPatch.context() as monkeypatch:
        seen = Seen(monkeypatch)
        runs.run(prepared, output, *LONG_RUN)
    return output, seen


def test_every_data_set_gets_its_share(long_run: tuple[Path, Seen]) -> None:
    _, seen = long_run
    epoch, drawn = sum(seen.sizes), np.concatenate(seen.ids)
    assert len(seen.sizes) == 2 and len(drawn) == 8 * STEPS > epoch
    counts = np.bincount(drawn[:epoch], minlength=epoch)
    first, second = counts[: seen.sizes[0]], counts[seen.sizes[0] :]
    assert (first.sum(), second.sum()) == (round(0.75 * epoch), epoch - round(0.75 * epoch))
    for part in (first, second):
        assert part.max() - part.min() <= 1  # within a data set all referents come equally often


def test_every_data_set_is_validated_every_so_many_steps(long_run: tuple[Path, Seen]) -> None:
    output, _ = long_run
    evaluations = [entry for entry in runs.log(output) if "refshapes:val/mIoU" in entry]
    assert [entry["step"] for entry in evaluations] == [2, 4, 6]
    assert all("refshapes+:val/oIoU" in entry for entry in evaluations)
    results = json.loads((output / "results.json").read_text())["results"]
    assert [(result["dataset"], result["split"]) for result in results] == [(name, "val") for name in NAMES]


def test_best_is_the_best_by_the_named_metric(long_run: tuple[Path, Seen]) -> None:
    output, _ = long_run
    scores = {
        entry["step"]: entry["refshapes+:val/mIoU"] for entry in runs.log(output) if "refshapes+:val/mIoU" in entry
    }
    best = checkpoints.load_trainer_state(output / "last")["best"]
    assert best == pytest.approx(max(scores.values()))
    assert checkpoints.step_of(output / "best") == min(step for step in scores if scores[step] == max(scores.values()))
    assert (output / "best" / "model" / "model.safetensors").is_file()


def test_the_averaged_weights_are_scored_and_exported(
    long_run: tuple[Path, Seen], prepared: Path, tmp_path: Path
) -> None:
    """The exported folder scores what the run said; the weights that were trained do not equal the average."""
    output, _ = long_run
    said = json.loads((output / "last" / "model" / "results.json").read_text())["results"]
    assert {result["provenance"]["weights"] for result in said} == {"ema"}
    evaluate(
        ["--checkpoint", str(output / "last"), "--data.prepared", str(prepared), "--data.workers", "0", "--splits",
         "val", "--data.datasets", "[refshapes, refshapes+]", "--output", str(tmp_path), "--pictures", "0"]
    )  # fmt: skip
    again = json.loads((tmp_path / "results.json").read_text())["results"]
    for one, other in zip(said, again, strict=True):
        assert one["metrics_percent"] == pytest.approx(other["metrics_percent"], abs=0.01)


def test_a_time_limit_saves_and_asks_to_be_queued_again_and_the_rest_is_exact(
    long_run: tuple[Path, Seen], prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, expected = long_run
    seen = Seen(monkeypatch)
    with pytest.raises(SystemExit) as stop:
        runs.run(prepared, tmp_path, *LONG_RUN, "--train.time_limit", "0")
    assert stop.value.code == 75 and (tmp_path / "requeue").exists()
    assert checkpoints.step_of(tmp_path / "last") == 1
    runs.run(prepared, tmp_path, *LONG_RUN)
    assert not (tmp_path / "requeue").exists()
    assert seen.ids == expected.ids  # the shares as well: nothing twice, nothing left out
    assert runs.same_weights(tmp_path, whole)  # the average too, for it is what is exported
    assert checkpoints.step_of(tmp_path / "best") == checkpoints.step_of(whole / "best")


def test_early_stopping(prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without learning nothing gets better after the first evaluation."""
    runs.run(prepared, tmp_path, "--optim.lr", "0", "--optim.weight_decay", "0", "--evaluation.every_steps", "1",
             "--evaluation.patience", "2", "--method", "supervised", "--model.kwargs.text_dropout", "0")  # fmt: skip
    state = checkpoints.load_trainer_state(tmp_path / "last")
    assert (state["step"], state["best_step"]) == (3, 1)
    assert "no better oIoU in 2 evaluations: stopping early" in capsys.readouterr().out


def test_shares_that_do_not_fit_are_rejected(prepared: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data\.weights has 1 numbers for 2 data sets"):
        runs.run(prepared, tmp_path, "--data.datasets", "[refshapes, refshapes+]", "--data.weights", "[1]")
