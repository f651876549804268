"""Nothing that is published names a path of this machine, and a tokenizer is known by its contents."""

import shutil
from pathlib import Path

import pytest

from amltrain.data.text import SentenceTokenizer
from amltrain.errors import UserError
from amltrain.evaluation.results import read_results, write_results
from amltrain.hub.model_card import build_model_card
from amltrain.hub.push import _public, push_model
from tests.training import runs


def test_published_files_hold_no_path_and_the_tokenizer_may_move(shapes: Path, tmp_path: Path) -> None:
    first, second, output = tmp_path / "private" / "words", tmp_path / "elsewhere" / "renamed", tmp_path / "run"
    SentenceTokenizer.train_wordpiece(["the red circle", "a blue square"], 12).save(first)
    flags = ("--evaluation.every_steps", "1", "--checkpoint.every_steps", "1", "--preprocess.tokenizer")
    runs.run(shapes, output, "--train.max_steps", "1", *flags, str(first))
    folder = output / "last" / "model"
    texts = {path.name: path.read_text() for path in folder.iterdir() if path.suffix in (".json", ".txt")}
    rows = read_results(folder / "results.json")
    texts["README.md"] = str(build_model_card(folder, "user/name", rows))
    assert {"training.json", "preprocessor_config.json", "results.json"} <= texts.keys()
    for name, text in texts.items():
        assert str(tmp_path) not in text and "/private" not in text, name
    rows[0].provenance["checkpoint"] = str(folder)  # as `amltrain evaluate --checkpoint` writes it
    write_results(tmp_path / "scores.json", rows)
    assert _public(rows[0]).provenance["checkpoint"] == "last/model"
    scores = tmp_path / "scores.json"
    assert str(tmp_path) not in push_model(
        output / "last", "user/name", private=True, results_file=scores, dry_run=True
    )
    shutil.copytree(first, second)
    shutil.rmtree(first)
    runs.run(shapes, output, "--train.max_steps", "2", *flags, str(second))
    assert (output / "last").resolve().name == "step-000002"
    other = tmp_path / "other"
    SentenceTokenizer.train_wordpiece(["other words"], 12).save(other)
    with pytest.raises(UserError, match=r"preprocess\.tokenizer"):
        runs.run(shapes, output, "--train.max_steps", "3", *flags, str(other))
