"""What the loop promises of one uninterrupted run, on a tiny CARIS with AML and dropout."""

import json
from pathlib import Path

import pytest
import torch

from amltrain.errors import UserError
from amltrain.pretrained import load_pretrained
from amltrain.training import checkpoint as checkpoints
from tests.training import runs


def test_a_run_leaves_what_it_promises(whole: Path) -> None:
    assert [checkpoints.step_of(p) for p in checkpoints.checkpoints(whole)] == [2, 4, 6, 8]
    results = json.loads((whole / "results.json").read_text())
    assert "val" in json.dumps(results)
    assert len(runs.losses(whole)) == 8
    loaded = load_pretrained(whole / "best")
    assert loaded.name == "caris_tiny"
    assert loaded.preprocess.size == 64
    assert not any(key.startswith(("scorer", "loss")) for key in runs.weights(whole))


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
