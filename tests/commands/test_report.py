"""The report command finds a run's model and data, scores it, and writes the page."""

import json
import sys
from pathlib import Path

import pytest
import torch
import yaml

from amltrain.commands.evaluate import main as evaluate
from amltrain.commands.report import build_parser
from amltrain.data.text import SentenceTokenizer
from amltrain.errors import UserError
from amltrain.hub.model_folder import save_pretrained
from amltrain.models import create_model, model_info
from amltrain.report.page import find_source, report


@pytest.fixture
def run(tmp_path: Path, shapes: Path) -> Path:
    torch.manual_seed(0)
    info = model_info("caris_tiny")
    tokenizer = SentenceTokenizer.train_wordpiece(["red square", "the blue circle on the left"], 24)
    kwargs = {"vocab_size": tokenizer.vocab_size}
    save_pretrained(
        tmp_path / "run" / "last" / "model",
        name="caris_tiny",
        kwargs=kwargs,
        state_dict=create_model("caris_tiny", **kwargs).state_dict(),
        preprocess=info.preprocess,
        protocol=info.protocol,
        tokenizer=tokenizer,
    )
    settings = {
        "data": {"datasets": ["refshapes"], "prepared": str(shapes)},
        "evaluation": {"splits": ["val"]},
    }
    (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump(settings))
    (tmp_path / "run" / "log.jsonl").write_text(json.dumps({"step": 1, "loss": 0.5}) + "\n")
    return tmp_path / "run"


def test_a_run_becomes_a_page(run: Path) -> None:
    args = build_parser().parse_args([str(run), "--max_samples", "12", "--pictures", "3", "--samples", "5"])
    text = report(args).read_text(encoding="utf-8")
    assert text.count("<article") in (3, 4)  # sample 5, and three others unless too few referents are left
    assert "sample 5," in text and "· chosen ·" in text
    for part in ("Training loss", "Distribution of IoU", "AML mask", "refshapes", "oIoU", "first 12 samples"):
        assert part in text


def test_scores_of_an_evaluation_are_shown_and_not_scored_again(
    run: Path, shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = ["--data.datasets", "[refshapes]", "--data.prepared", str(shapes), "--data.workers", "0"]
    flags = ["--splits", "val", "--pictures", "0", *data]
    evaluate(["--checkpoint", str(run / "last"), "--output", str(tmp_path / "scored"), *flags])
    [row] = json.loads((tmp_path / "scored" / "results.json").read_text())["results"]
    monkeypatch.setattr(sys.modules["amltrain.report.page"], "evaluate_model", None)
    args = [str(run), "--results", str(tmp_path / "scored"), "--pictures", "3"]
    text = report(build_parser().parse_args(args)).read_text(encoding="utf-8")
    assert f"{row['metrics_percent']['oIoU']:.2f}" in text
    assert text.count("<article") == 3
    with pytest.raises(UserError, match=r"has no scores of .* on refshapes testA"):
        report(build_parser().parse_args([*args, "--splits", "testA"]))
    with pytest.raises(UserError, match="leave --max_samples out"):
        report(build_parser().parse_args([*args, "--max_samples", "4"]))


def test_bad_input(run: Path, tmp_path: Path) -> None:
    for flags, message in (
        ([str(run), "--checkpoint", "step-7"], "has no checkpoint step-7"),
        ([str(run), "--samples", "9999"], "9999 is not a sample id"),
        ([str(run), "--pictures", "-1"], "--pictures"),
        ([str(run / "last")], "give --output"),
        ([str(run / "nothing")], "has no checkpoint nothing; it has last"),
        ([str(run), "--output", str(run)], "it is a folder; choose another --output"),
    ):
        with pytest.raises(UserError, match=message):
            report(build_parser().parse_args([*flags, "--max_samples", "4"]))
    (tmp_path / "run" / "config.yaml").write_text("{ not yaml")
    with pytest.raises(UserError, match="cannot be read"):
        find_source(str(run), "best")
