"""The folder that predict writes: names that never collide, rows that stay."""

import json
from pathlib import Path

import pytest
from PIL import Image

from amltrain.errors import UserError
from amltrain.inference.predict import PredictionFolder

SENTENCES = ["red", "red overlay", "Red", "red!", "red-2", "红色", "?", "!", "x" * 5000, "x" * 5001]


def rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]


def write(folder: Path, images: list[str], sentences: list[str], mark: int = 0) -> list[str]:
    written = []
    with PredictionFolder(folder, images, sentences) as output:
        for image in images:
            for sentence in sentences:
                for kind in ("masks", "overlays"):
                    written.append(output.save(Image.new("L", (2, 2)), kind, image, sentence))
                output.add({"image": image, "sentence": sentence, "mark": mark})
    return written


def test_no_two_predictions_share_a_file(tmp_path: Path) -> None:
    written = write(tmp_path, ["a/photo.jpg", "b/photo.jpg", "b/photo-red.png"], SENTENCES)
    assert len({name.lower() for name in written}) == len(written) == 2 * 3 * len(SENTENCES)
    assert all(Path(name).is_file() for name in written)


def test_rows_of_earlier_calls_stay_and_the_same_pair_is_replaced(tmp_path: Path) -> None:
    first = write(tmp_path, ["a.jpg"], ["red", "blue"], 1)
    second = write(tmp_path, ["a.jpg", "A.jpg"], ["red"], 2)
    assert [(r["image"], r["sentence"], r["mark"]) for r in rows(tmp_path)] == [
        ("a.jpg", "blue", 1),
        ("a.jpg", "red", 2),
        ("A.jpg", "red", 2),
    ]
    assert second[:2] == first[:2]
    assert not set(second[2:]) & set(first)


def test_a_folder_that_cannot_be_used(tmp_path: Path) -> None:
    (tmp_path / "predictions.jsonl").write_text("{ not json\n")
    with pytest.raises(UserError, match="damaged"):
        PredictionFolder(tmp_path, [], [])
    with pytest.raises(UserError, match=r"cannot write .*; choose another --output"):
        PredictionFolder(tmp_path / "predictions.jsonl" / "inside", [], [])
