"""Real trackers: a killed run continues its own run in each of them, and one that cannot start ends in a sentence."""

import json
import signal
import sqlite3
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

from amltrain.errors import UserError
from amltrain.run_folder import TRACKERS_FILE
from tests.training import runs

SHORT = ("--train.max_steps", "12", "--evaluation.every_steps", "6", "--evaluation.pictures", "2")


def kill_and_resume(prepared: Path, output: Path, tracker: str, environment: dict[str, str]) -> str:
    """SIGKILL a run after its first evaluation, and rerun it to the end. Returns the id of its run in the tracker."""
    options = (*SHORT, "--tracking.trackers", f"[{tracker}]", "--tracking.project", "trackers-test")
    killed = runs.launch(prepared, output, *options, environment=environment)
    killed.wait_until(lambda: len(runs.log(output)) >= 8)
    killed.send(signal.SIGKILL)
    assert killed.finish() == -signal.SIGKILL, killed.said()
    ids = json.loads((output / TRACKERS_FILE).read_text())
    runs.finished(prepared, output, *options, environment=environment)
    assert json.loads((output / TRACKERS_FILE).read_text()) == ids
    assert len(runs.losses(output)) == 12
    return str(ids[tracker])


@pytest.mark.slow
def test_wandb_offline_continues_its_run(shapes: Path, tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    output = tmp_path / "run"
    identity = kill_and_resume(shapes, output, "wandb", {"WANDB_MODE": "offline", "WANDB_SILENT": "true"})
    starts = sorted((output / "wandb").glob("offline-run-*"))
    assert len(starts) == 2  # one folder for each start, of one run
    assert all(folder.name.endswith(f"-{identity}") for folder in starts)
    media = [list(folder.glob("files/media/*/**/*")) for folder in starts]
    for files in media:
        assert any(file.suffix == ".png" and "predictions" in str(file) for file in files)
        assert any(file.suffix == ".html" and "IoU" in file.read_text() for file in files)


@pytest.mark.slow
def test_trackio_continues_its_run(shapes: Path, tmp_path: Path) -> None:
    pytest.importorskip("trackio")
    database = tmp_path / "trackio"
    identity = kill_and_resume(shapes, tmp_path / "run", "trackio", {"TRACKIO_DIR": str(database)})
    [(name, lines)] = logged(database).items()
    assert name == identity
    assert {step for step, values in lines if "loss" in values} == set(range(1, 13))
    evaluation = [values for _, values in lines if "evaluation" in values]
    assert evaluation and all(values["evaluation"]["_type"] == "trackio.markdown" for values in evaluation)
    assert all(any(key.startswith("predictions/") for key in values) for values in evaluation)


def logged(database: Path) -> dict[str, list[tuple[int, dict[str, Any]]]]:
    """Run -> its (step, values), from trackio's own file."""
    [file] = database.glob("trackers-test*.db")
    found, identities = defaultdict(list), set()
    for identity, run, step, values in sqlite3.connect(file).execute(
        "select run_id, run_name, step, metrics from metrics order by id"
    ):
        found[run].append((step, json.loads(values)))
        identities.add(identity)
    assert len(identities) == 1
    return found


def test_wandb_without_a_login_ends_in_a_sentence(
    shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_API_KEY", "")
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.setenv("HOME", str(tmp_path))
    arguments = (
        "--tracking.trackers",
        "[tensorboard,wandb]",
        "--train.max_steps",
        "2",
        "--evaluation.every_steps",
        "2",
    )
    with pytest.raises(UserError, match=r"wandb could not start \(.*\); log in or configure it") as caught:
        runs.run(shapes, tmp_path / "run", *arguments)
    assert "\n" not in str(caught.value)
    runs.run(shapes, tmp_path / "run", *arguments, "--tracking.optional", "true")
    assert list((tmp_path / "run").rglob("events.out.tfevents.*"))
