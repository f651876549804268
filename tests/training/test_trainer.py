"""What the loop promises of one uninterrupted run, on a tiny CARIS with AML and dropout."""

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from amltrain import run_folder as checkpoints
from amltrain.checkpoints.resume import compare_surroundings
from amltrain.commands.train import read_run
from amltrain.errors import UserError
from amltrain.hub.model_folder import load_pretrained
from amltrain.records import Batch
from amltrain.training.run import Step
from amltrain.training.trainer import Trainer
from tests.training import runs, sabotage


def test_a_run_leaves_what_it_promises(whole: Path) -> None:
    assert [checkpoints.step_of(p) for p in checkpoints.checkpoints(whole)] == [2, 4, 6, 8]
    results = json.loads((whole / "results.json").read_text())
    assert "val" in json.dumps(results)
    assert len(runs.losses(whole)) == 8
    loaded = load_pretrained(whole / "best")
    assert loaded.name == "caris_tiny"
    assert loaded.preprocess.size == 64
    assert not any(key.startswith(("masker", "scorer", "loss", "model.")) for key in runs.weights(whole))


def test_steps_that_are_not_finite_leave_no_trace(
    shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Neither in weights nor in batch norms' statistics, which a forward pass changes before anybody looks at it."""
    monkeypatch.setattr(Trainer, "_optimizer_step", Trainer._optimizer_step)
    sabotage.nan_images((2, 3))
    runs.run(shapes, tmp_path / "goes-on", "--train.max_steps", "4")
    state = checkpoints.load_trainer_state(tmp_path / "goes-on" / "last")
    assert (state["skipped"], state["bad_in_a_row"]) == (2, 0)
    assert all(torch.isfinite(tensor).all() for tensor in runs.weights(tmp_path / "goes-on").values())
    assert "samples [" in capsys.readouterr().out
    skipped = [line["skipped_samples"] for line in runs.log(tmp_path / "goes-on") if "skipped_samples" in line]
    assert [len(samples) for samples in skipped] == [8, 8]
    assert skipped[0][0].keys() == {"sample_id", "dataset", "image_id", "ref_id"}
    with pytest.raises(UserError, match=r"2 steps in a row were not finite.*last good checkpoint: \S*step-000002"):
        runs.run(shapes, tmp_path / "stops", "--train.max_bad_steps", "2")


def test_the_config_says_what_the_preset_fills_in_and_which_code_ran(shapes: Path, tmp_path: Path) -> None:
    config = runs.run(
        shapes, tmp_path, "--train.max_steps", "1", "--method", "aml", "--tracking.trackers", "[tensorboard]"
    )
    [again, code, options, *_] = (tmp_path / "config.yaml").read_text().splitlines()
    assert again == f"# the run again: amltrain train --config {tmp_path / 'config.yaml'} --output OTHER"
    assert code.startswith("# amltrain ") and ", commit " in code
    assert options.startswith("# aml with its preset and defaults: ") and '"paper"' in options and "tau 0.4" in options
    assert read_run(["--config", str(tmp_path / "config.yaml")]) == config
    logged = yaml.safe_load(next(tmp_path.rglob("hparams.yml")).read_text())
    assert logged["aml.tau"] == 0.4 and logged["seed"] == config.seed and logged["optim.lr"] == config.optim.lr
    assert len(logged["commit"]) >= 7


def test_fewer_steps_than_were_trained_are_rejected(shapes: Path, tmp_path: Path) -> None:
    runs.run(shapes, tmp_path, "--train.max_steps", "4")
    before = (tmp_path / "config.yaml").read_text()
    with pytest.raises(UserError, match=r"is at step 4, beyond the 2 steps .* larger train\.max_steps"):
        runs.run(shapes, tmp_path, "--train.max_steps", "2")
    assert (tmp_path / "config.yaml").read_text() == before
    runs.run(shapes, tmp_path, "--train.max_steps", "4")  # a finished run is only scored again


def test_a_score_of_0_is_warned_of_once(shapes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    often = ("--train.max_steps", "3", "--evaluation.every_steps", "1", "--evaluation.protocol.threshold", "0.999")
    runs.run(shapes, tmp_path, *often)
    said = capsys.readouterr().out
    assert said.count("the model predicts no referent yet") == 1 and said.count("step 3\n") == 1


def test_weights_that_are_not_finite_are_never_saved(shapes: Path, tmp_path: Path) -> None:
    """An update of 0 / 0 spoils them, though its loss and gradient were finite."""
    runs.run(shapes, tmp_path, "--train.max_steps", "2")
    branch = tmp_path / "branch"
    without_eps = ("--optim.eps", "0", "--optim.clip_norm", "1e-30", "--model.checkpoint", str(tmp_path / "last"))
    with pytest.raises(UserError, match=r"weights are not finite after step 1 .* \(last good checkpoint: none yet\)"):
        runs.run(shapes, branch, *without_eps, "--checkpoint.every_steps", "1")
    assert not checkpoints.checkpoints(branch)


def test_out_of_memory_names_the_ways_out(shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Trainer, "_optimizer_step", Trainer._optimizer_step)
    sabotage.out_of_memory(1)
    with pytest.raises(UserError) as caught:
        runs.run(shapes, tmp_path / "run")
    message = str(caught.value)
    assert "train.micro_batch_size to 4" in message and "global batch of 8 is accumulated" in message
    assert "model.gradient_checkpointing" in message and "\n" not in message


def test_a_metric_that_will_never_come_is_rejected_at_once(shapes: Path, tmp_path: Path) -> None:
    for metric, named in (("val/oiou", "did you mean oIoU"), ("testA/oIoU", "evaluated are val")):
        with pytest.raises(UserError, match=named):
            runs.run(shapes, tmp_path, "--evaluation.best_metric", metric)
    assert not runs.log(tmp_path)


def test_signals_do_again_what_they_did(shapes: Path, tmp_path: Path) -> None:
    runs.run(shapes, tmp_path, "--train.max_steps", "1")
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)] == [signal.SIG_DFL] * 2


def test_the_weights_average_is_what_is_exported(shapes: Path, tmp_path: Path) -> None:
    extra = ("--train.max_steps", "3", "--train.ema_decay", "0.5", "--method", "supervised")
    runs.run(shapes, tmp_path / "ema", *extra)
    runs.run(shapes, tmp_path / "raw", *extra[:2], *extra[4:])
    averaged, raw = runs.weights(tmp_path / "ema"), runs.weights(tmp_path / "raw")
    assert averaged.keys() == raw.keys()
    assert any(not torch.equal(averaged[key], raw[key]) for key in raw)


def test_every_group_may_start_at_the_full_rate_for_one_epoch(
    shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in the official CRIS code; also in a run given in steps, and in one resumed in the middle of that epoch."""
    rates: list[tuple[int, list[float]]] = []
    sound = Trainer._optimizer_step

    def watched(self: Trainer, batches: list[Batch]) -> Step:
        stats = sound(self, batches)
        epoch = (self.progress.step - 1) // self.steps_per_epoch
        rates.append((epoch, [group["lr"] for group in self.optimizer.param_groups]))
        return stats

    monkeypatch.setattr(Trainer, "_optimizer_step", watched)
    extra = ("--model.name", "cris_tiny", "--model.kwargs", "{}", "--method", "supervised")
    extra += ("--train.global_batch_size", "16", "--train.max_steps", "6")
    extra += ("--optim.schedule", "constant", "--optim.first_epoch_full_lr", "true")
    runs.run(shapes, tmp_path / "run", *extra)
    assert [epoch for epoch, _ in rates] == [0, 0, 0, 0, 1, 1]
    assert all(set(rate) == ({1e-3} if epoch == 0 else {1e-4, 1e-3}) for epoch, rate in rates)
    whole, rates = rates, []
    runs.run(shapes, tmp_path / "branch", *extra, "--resume", str(tmp_path / "run" / "step-000002"))
    assert rates == whole[2:]


def test_a_batch_that_does_not_divide_is_rejected(shapes: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not a multiple"):
        runs.run(shapes, tmp_path, "--train.micro_batch_size", "3")


def test_data_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data\.refer_root"):
        runs.run(tmp_path / "nowhere", tmp_path / "out", "--data.datasets", "[refcoco]")


@pytest.mark.parametrize("harm", ["renamed", "removed", "replaced"])
def test_a_folder_that_goes_ends_the_run_and_is_not_made_again(shapes: Path, tmp_path: Path, harm: str) -> None:
    """Also where nothing is logged for a long time, and nothing is saved."""
    output = tmp_path / "run"
    extra = ("--train.log_every", "100", "--train.max_steps", "300", "--checkpoint.every_steps", "300")
    launched = runs.launch(shapes, output, *extra, "--evaluation.every_steps", "300")
    launched.wait_until((output / "config.yaml").exists)
    output.rename(tmp_path / "away")
    if harm == "removed":
        shutil.rmtree(tmp_path / "away", ignore_errors=True)
    if harm == "replaced":
        output.mkdir()
    assert launched.finish(60) == 2, launched.said()
    said = "is another folder than the run began with" if harm == "replaced" else "was removed or renamed"
    (line,) = [line for line in launched.said().splitlines() if line.startswith("error: ")]
    assert said in line and "put it back" in line and "Traceback" not in launched.said()
    assert output.exists() == (harm == "replaced")
    assert not output.exists() or not list(output.iterdir())


def test_what_differs_from_where_a_checkpoint_was_made_is_said(
    whole: Path, shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = tmp_path / "step-000008"
    (checkpoint / "model").mkdir(parents=True)
    record = json.loads((whole / "last/model/training.json").read_text())
    assert record["threads"] == torch.get_num_threads() and record["evaluated_fingerprints"]
    said: list[str] = []

    def compare(**changes: Any) -> str:
        said.clear()
        (checkpoint / "model" / "training.json").write_text(json.dumps({**record, **changes}))
        compare_surroundings(checkpoint, record["evaluated_fingerprints"], said.append)
        return "\n".join(said)

    assert compare() == ""
    versions = record["versions"]
    assert "torch 1.0, now" in compare(versions={**versions, "torch": "1.0"})
    assert "CPU threads 77, now" in compare(threads=77)
    assert "code abc, now" in compare(commit="abc") or record["commit"] is None
    assert "was scored on other data of the split val" in compare(evaluated_fingerprints={"val": "other"})
    assert "does not know its training data's contents" in compare(data_fingerprint="")
    for odd in ({"versions": 3}, {"evaluated_fingerprints": []}, {"threads": None}, {"versions": {}}):
        assert "Traceback" not in compare(**odd)


def test_results_of_a_run_name_step_and_weights(whole: Path) -> None:
    manifest = json.loads((whole / "last/manifest.json").read_text())
    hashed = manifest["files"]["model/model.safetensors"]["sha256"]
    for path in (whole / "results.json", whole / "last/model/results.json"):
        (row,) = json.loads(path.read_text())["results"]
        assert (row["provenance"]["step"], row["provenance"]["weights_sha256"]) == (8, hashed)
