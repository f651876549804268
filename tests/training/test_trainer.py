"""The loop's promises, on a tiny CARIS with AML and dropout: exact resume, one result however a batch is shared."""

import json
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch

from amltrain.errors import UserError
from amltrain.pretrained import load_pretrained
from amltrain.training import checkpoint as checkpoints
from amltrain.training.interruption import REQUEUE_EXIT_CODE
from tests.training import runs


@pytest.fixture(scope="module")
def whole(shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run."""
    output = tmp_path_factory.mktemp("whole")
    runs.run(shapes, output)
    return output


def same_weights(one: Path, other: Path) -> bool:
    a, b = runs.weights(one), runs.weights(other)
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_a_run_leaves_what_it_promises(whole: Path) -> None:
    assert [checkpoints.step_of(p) for p in checkpoints.checkpoints(whole)] == [2, 4, 6, 8]
    results = json.loads((whole / "results.json").read_text())
    assert "val" in json.dumps(results)
    assert len(runs.losses(whole)) == 8
    loaded = load_pretrained(whole / "best")
    assert loaded.name == "caris_tiny"
    assert loaded.preprocess.size == 64
    assert not any(key.startswith(("scorer", "loss")) for key in runs.weights(whole))


def test_resume_in_the_middle_of_an_epoch_is_exact(whole: Path, shapes: Path, tmp_path: Path) -> None:
    runs.run(shapes, tmp_path, "--train.max_steps", "8", "--resume", str(whole / "step-000002"))
    assert same_weights(whole, tmp_path)
    assert runs.losses(tmp_path) == runs.losses(whole)[2:]


def test_killed_and_terminated_runs_end_bit_identical(whole: Path, shapes: Path, tmp_path: Path) -> None:
    """kill -9 once there is a checkpoint, SIGTERM after the restart, then left alone; with a loader process."""
    extra = ("--data.workers", "1")
    with subprocess.Popen(runs.command(shapes, tmp_path, *extra), env=runs.environment()) as process:
        wait_for(lambda: checkpoints.checkpoints(tmp_path), process)
        process.kill()
    before = checkpoints.checkpoints(tmp_path)[-1]
    with subprocess.Popen(runs.command(shapes, tmp_path, *extra), env=runs.environment()) as process:
        wait_for(lambda: len(runs.losses(tmp_path)) > checkpoints.step_of(before), process)
        process.send_signal(signal.SIGTERM)
        code = process.wait(timeout=300)
    if code != 0:  # it may have finished first
        assert code == REQUEUE_EXIT_CODE
        assert (tmp_path / "requeue").is_file()
    assert runs.launch(shapes, tmp_path, *extra).returncode == 0
    assert not (tmp_path / "requeue").exists()
    assert same_weights(whole, tmp_path)
    assert runs.losses(tmp_path) == runs.losses(whole)


def wait_for(happened, process: subprocess.Popen, seconds: float = 300) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            if happened():
                return
        except FileNotFoundError:
            pass
        if process.poll() is not None:
            return
        time.sleep(0.02)
    raise TimeoutError("nothing happened")


def test_one_result_however_a_batch_is_shared(shapes: Path, tmp_path: Path) -> None:
    """1 process x 4 accumulated and 2 processes x 2 accumulated: the same losses, AML and dropout included."""
    extra = ("--train.micro_batch_size", "2", "--train.max_steps", "4", "--checkpoint.every_steps", "4")
    runs.run(shapes, tmp_path / "one", *extra)
    finished = runs.launch(shapes, tmp_path / "two", *extra, processes=2)
    assert finished.returncode == 0, finished.stderr[-2000:]
    one, two = runs.losses(tmp_path / "one"), runs.losses(tmp_path / "two")
    assert one == pytest.approx(two, abs=2e-5)
    evaluations = [[e for e in runs.log(tmp_path / name) if "val/mIoU" in e][-1] for name in ("one", "two")]
    assert evaluations[0]["val/mIoU"] == pytest.approx(evaluations[1]["val/mIoU"], abs=0.5)
    largest = max(
        (a - b).abs().max() for a, b in zip(*map(sorted_weights, (tmp_path / "one", tmp_path / "two")), strict=True)
    )
    assert largest < 5e-4


def sorted_weights(output: Path) -> list[torch.Tensor]:
    return [tensor for _, tensor in sorted(runs.weights(output).items())]


def test_steps_that_are_not_finite_are_skipped_and_counted(
    shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from amltrain.losses import WeightedCrossEntropy

    calls = [0]
    sound = WeightedCrossEntropy.forward

    def sometimes_nan(self, output, batch):
        calls[0] += 1
        result = sound(self, output, batch)
        return {"loss": result["loss"] * float("nan")} if calls[0] in (2, 3) else result

    monkeypatch.setattr(WeightedCrossEntropy, "forward", sometimes_nan)
    runs.run(shapes, tmp_path / "goes-on", "--train.max_steps", "4")
    state = checkpoints.load_trainer_state(tmp_path / "goes-on" / "last")
    assert (state["skipped"], state["bad_in_a_row"]) == (2, 0)
    assert all(torch.isfinite(tensor).all() for tensor in runs.weights(tmp_path / "goes-on").values())
    assert "samples [" in capsys.readouterr().out
    calls[0] = 0
    with pytest.raises(UserError, match="2 steps in a row were not finite"):
        runs.run(shapes, tmp_path / "stops", "--train.max_bad_steps", "2")


def test_the_weights_average_is_what_is_exported(shapes: Path, tmp_path: Path) -> None:
    extra = ("--train.max_steps", "3", "--train.ema_decay", "0.5", "--aml.enabled", "false")
    runs.run(shapes, tmp_path / "ema", *extra)
    runs.run(shapes, tmp_path / "raw", *extra[:2], *extra[4:])
    averaged, raw = runs.weights(tmp_path / "ema"), runs.weights(tmp_path / "raw")
    assert averaged.keys() == raw.keys()
    assert any(not torch.equal(averaged[key], raw[key]) for key in raw)


def test_a_batch_that_does_not_divide_is_refused(shapes: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not a multiple"):
        runs.run(shapes, tmp_path, "--train.micro_batch_size", "3")


def test_data_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data\.refer_root"):
        runs.run(tmp_path / "nowhere", tmp_path / "out", "--data.datasets", "[refcoco]")
