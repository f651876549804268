"""Whatever cuts a run short, going on gives the run that nothing had cut short, bit for bit on a CPU."""

import json
import shutil
import signal
from functools import partial
from pathlib import Path

import pytest

from amltrain import run_folder as checkpoints
from amltrain.errors import REQUEUE_EXIT_CODE, UserError
from tests.training import runs, sabotage


def test_in_the_middle_of_an_epoch(whole: Path, shapes: Path, tmp_path: Path) -> None:
    runs.run(shapes, tmp_path, "--resume", str(whole / "step-000002"))
    assert runs.same_weights(whole, tmp_path)
    assert runs.losses(tmp_path) == runs.losses(whole)[2:]


def test_killed_between_saves_during_one_and_asked_to_stop(whole: Path, shapes: Path, tmp_path: Path) -> None:
    """kill -9 twice, SIGTERM once, then left alone; with a loader process."""
    output, extra = tmp_path / "run", ("--data.workers", "1")
    launched = runs.launch(shapes, output, *extra)
    launched.wait_until(lambda: len(runs.losses(output)) >= 3)
    launched.send(signal.SIGKILL)
    assert launched.finish() == -signal.SIGKILL

    launched = runs.launch(shapes, output, *extra)
    launched.wait_until((output / ".step-000004.writing").exists)
    launched.send(signal.SIGKILL)
    assert launched.finish() == -signal.SIGKILL
    assert checkpoints.step_of(output / "last") in (2, 4)

    launched = runs.launch(shapes, output, *extra)
    launched.wait_until(lambda: len(runs.losses(output)) >= 5)
    launched.send(signal.SIGTERM)
    assert launched.finish() == REQUEUE_EXIT_CODE, launched.said()
    assert (output / "requeue").is_file()

    runs.finished(shapes, output, *extra)
    assert not (output / "requeue").exists()
    assert not list(output.glob(".step-*"))
    assert runs.same_weights(whole, output)
    assert runs.losses(output) == runs.losses(whole)


def test_a_damaged_checkpoint_costs_its_steps_only(
    whole: Path, shapes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "run"
    shutil.copytree(whole, output, symlinks=True)
    victim = output / "step-000008" / "state" / "optimizer.safetensors"
    victim.write_bytes(victim.read_bytes()[:-100])
    runs.run(shapes, output)
    assert "skipping a damaged checkpoint" in capsys.readouterr().out
    assert runs.same_weights(whole, output)
    assert checkpoints.find_fault(output / "last") is None


def test_a_finished_run_is_scored_again_and_kept(whole: Path, shapes: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    shutil.copytree(whole, output, symlinks=True)
    (output / "best").unlink()  # killed after saving, before pointing at it
    (output / "results.json").unlink()
    runs.run(shapes, output)
    assert (output / "best").resolve() == (output / "step-000008").resolve()
    assert json.loads((output / "results.json").read_text()) == json.loads((whole / "results.json").read_text())
    assert runs.logged(output) == runs.logged(whole)  # its evaluation is not there twice


def test_the_best_stays_the_best(
    shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also where --output is relative, as it is by default."""
    monkeypatch.chdir(tmp_path)
    runs.run(shapes, Path("run"), "--train.max_steps", "2", "--evaluation.every_steps", "1")
    saved = checkpoints.load_trainer_state(Path("run/last"))
    runs.run(shapes, Path("run"), "--train.max_steps", "3", "--evaluation.every_steps", "1")
    resumed = checkpoints.load_trainer_state(Path("run/last"))
    assert "resuming from run/step-000002" in capsys.readouterr().out
    assert (resumed["best"], resumed["best_step"]) == (saved["best"], saved["best_step"])
    assert resumed["worse_in_a_row"] == saved["worse_in_a_row"] + 1


def test_a_stream_goes_on_where_it_was(shapes: Path, tmp_path: Path) -> None:
    """In the middle of an epoch, with loader processes, which read ahead of the training."""
    stream = ("--data.streaming", "true", "--data.workers", "2", "--train.max_steps", "6")
    runs.run(shapes, tmp_path / "whole", *stream)
    runs.run(shapes, tmp_path / "rest", *stream, "--resume", str(tmp_path / "whole" / "step-000004"))
    assert runs.losses(tmp_path / "rest") == runs.losses(tmp_path / "whole")[4:]
    assert runs.same_weights(tmp_path / "whole", tmp_path / "rest")


def test_asked_to_stop_while_evaluating(whole: Path, shapes: Path, tmp_path: Path) -> None:
    """It leaves at once with nothing lost, and evaluates when it is started again."""
    output = tmp_path / "run"
    stop = partial(sabotage.signal_in_evaluation, signal.SIGTERM, 2)
    said = runs.finished(shapes, output, before=stop, expected=REQUEUE_EXIT_CODE)
    assert "asked to stop (SIGTERM): saved at step 8" in said
    assert (output / "requeue").is_file() and not (output / "best").exists()
    runs.finished(shapes, output)
    assert (output / "best").resolve() == (output / "step-000008").resolve()
    assert len(runs.losses(output)) == 8
    assert runs.same_weights(whole, output)


def test_asked_to_stop_between_micro_batches(shapes: Path, tmp_path: Path) -> None:
    """The step is dropped, not finished, and nothing of it is counted: weights, losses and statistics are the same."""
    extra = ("--train.micro_batch_size", "2", "--aml.diagnostics_every", "4", "--train.max_steps", "4")
    runs.run(shapes, tmp_path / "whole", *extra)
    stop = partial(sabotage.signal_in_micro_batch, signal.SIGTERM, 10)  # the second of four in step 3
    output = tmp_path / "run"
    said = runs.finished(shapes, output, *extra, before=stop, expected=REQUEUE_EXIT_CODE)
    assert "asked to stop (SIGTERM): saved at step 2" in said
    runs.finished(shapes, output, *extra)
    assert runs.same_weights(tmp_path / "whole", output)
    assert runs.losses(output) == runs.losses(tmp_path / "whole")
    assert (output / "alignment.csv").read_text() == (tmp_path / "whole" / "alignment.csv").read_text()


@pytest.mark.parametrize(
    "score",
    [
        ("--aml.features", "pred", "--aml.score_decay", "0.5", "--aml.tau", "0.6"),
        ("--aml.projection", "grounded", "--aml.dim", "32", "--aml.tau", "0.5", "--aml.start_after", "1"),
    ],
)
def test_a_score_that_learns_goes_on_learning(shapes: Path, tmp_path: Path, score: tuple[str, ...]) -> None:
    """Averaged weights, a trained projection and a curriculum are where they were."""
    extra = (*score, "--aml.selection", "patch", "--aml.ramp_steps", "3", "--train.max_steps", "4")
    runs.run(shapes, tmp_path / "whole", *extra)
    runs.run(shapes, tmp_path / "resumed", *extra, "--resume", str(tmp_path / "whole" / "step-000002"))
    assert runs.same_weights(tmp_path / "whole", tmp_path / "resumed")
    assert runs.losses(tmp_path / "resumed") == runs.losses(tmp_path / "whole")[2:]


def test_the_words_keep_their_numbers(whole: Path, shapes: Path, tmp_path: Path) -> None:
    """A vocabulary built otherwise, by another version say, must not get between the weights and their words."""
    checkpoint = tmp_path / "step-000008"
    shutil.copytree(whole / "step-000008", checkpoint)
    file = checkpoint / "model" / "tokenizer.json"
    words = json.loads(file.read_text())
    vocabulary = words["model"]["vocab"]
    vocabulary["left"], vocabulary["circle"] = vocabulary["circle"], vocabulary["left"]
    file.write_text(json.dumps(words))
    manifest = json.loads((checkpoint / checkpoints.MANIFEST).read_text())
    manifest["files"] = {name: entry for name, entry in manifest["files"].items() if "tokenizer" not in name}
    (checkpoint / checkpoints.MANIFEST).write_text(json.dumps(manifest))
    runs.run(shapes, tmp_path / "run", "--resume", str(checkpoint), "--train.max_steps", "9")
    kept = json.loads((tmp_path / "run" / "last" / "model" / "tokenizer.json").read_text())["model"]["vocab"]
    assert kept == vocabulary


@pytest.mark.parametrize(
    ("change", "named"),
    [(("--seed", "1"), "seed 0, not 1"), (("--train.global_batch_size", "4"), "train.global_batch_size 8, not 4")],
)
def test_other_samples_are_rejected(
    whole: Path, shapes: Path, tmp_path: Path, change: tuple[str, str], named: str
) -> None:
    with pytest.raises(UserError, match=named):
        runs.run(shapes, tmp_path, *change, "--resume", str(whole / "step-000002"))


def test_on_another_number_of_processes(whole: Path, shapes: Path, tmp_path: Path) -> None:
    """1 process x 1, then 2 x 2, then 1 x 4 accumulated after an odd number of micro-batches: one run."""
    output = tmp_path / "run"
    shutil.copytree(whole, output, symlinks=True)
    for step in (4, 6, 8):
        shutil.rmtree(output / f"step-{step:06d}")
    micro = ("--train.micro_batch_size", "2")
    said = runs.finished(shapes, output, *micro, "--train.max_steps", "8", "--train.time_limit", "0", processes=2,
                         expected=REQUEUE_EXIT_CODE)  # fmt: skip
    assert "the run was spread 1 x 8 x 1 (processes x micro x accumulated) and continues as 2 x 2 x 2" in said
    assert checkpoints.step_of(output / "last") == 3
    runs.run(shapes, output, *micro)
    assert [entry["step"] for entry in runs.log(output) if "loss" in entry] == list(range(1, 9))
    assert runs.losses(output) == pytest.approx(runs.losses(whole), abs=0.02)  # other micro-batches, other dropout
