"""Every tool's export is prepared, trained on and predicted with: from the file as the tool writes it to a mask."""

import json
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState, GradientState, PartialState

from amltrain.commands.predict import main as predict
from amltrain.commands.prepare import main as prepare
from amltrain.commands.train import main as train
from tests.data.sources.test_importers import FORMS, export


def test_every_export_is_trained_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
    for form in FORMS:
        described = [] if form not in ("yolo", "voc") else ["--describe"]
        prepare([str(export(form, tmp_path / form)), "--name", f"from-{form}", "--workers", "1", *described])
        splits = json.loads((tmp_path / f"prepared/from-{form}/manifest.json").read_text())["splits"]
        assert splits["train"]["expressions"] >= 1 and sum(split["images"] for split in splits.values()) == 2
    names = f"[{','.join(f'from-{form}' for form in FORMS)}]"
    train([
        "--config", "quickstart", "--data.datasets", names, "--data.leak_filter", "false", "--data.workers", "0",
        "--method", "supervised", "--train.max_steps", "4", "--train.global_batch_size", "4",
        "--tracking.trackers", "[]",
        "--evaluation.pictures", "0", "--evaluation.splits", "[from-yolo:val]", "--output", "run",
    ])  # fmt: skip
    pictures = [str(next((tmp_path / form).rglob("*a.jpg"))) for form in FORMS]
    predict(["--checkpoint", "run/best", "--image", *pictures, "--sentence", "the square", "--output", "out"])
    rows = [json.loads(line) for line in (tmp_path / "out/predictions.jsonl").read_text().splitlines()]
    assert [row["sentence"] for row in rows] == ["the square"] * len(FORMS)
