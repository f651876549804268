"""Many sentences and images, what is said of them, and what is left out."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco

from amltrain.commands import predict as command
from amltrain.data.text import SentenceTokenizer
from amltrain.errors import UserError
from amltrain.inference import predict as predict_images
from amltrain.inference.predict import PredictionFolder, describe, predict, read_sentences, unread
from amltrain.inference.predictor import INSIDE, NO_PIXEL, NO_TARGET, Segmentation
from tests.inference.test_predictor import predictor

TOKENIZER = SentenceTokenizer.train_wordpiece(["the red square on the left", "a blue circle"], 6)


def test_a_sentence_that_is_read_is_not_mentioned() -> None:
    assert list(unread(TOKENIZER, "the red square")) == []


def test_a_sentence_that_is_cut() -> None:
    assert list(unread(TOKENIZER, "the red square on the left")) == [
        '"the red square on the left" is cut after 6 tokens; not read: left'
    ]


def test_a_sentence_of_unknown_words() -> None:
    for sentence, unknown in (("the 红色 方块", "红色 方块"), ("a sea", "sea")):
        assert list(unread(TOKENIZER, sentence)) == [f'"{sentence}": not in the model\'s vocabulary: {unknown}']


def test_what_a_probability_is_of_is_said() -> None:
    mask = np.zeros((10, 10), bool)
    mask[:5] = True
    values = mask.astype(np.float32)
    assert describe(Segmentation(mask, values, 0.9, False, INSIDE)) == (
        "50.0 % of the image, mean probability inside the mask 0.90"
    )
    dot = np.zeros((100, 100), bool)
    dot[0, 0] = True
    assert describe(Segmentation(dot, values, 0.9, False, INSIDE)).startswith("under 0.1 % of the image, ")
    nothing = ~mask & mask
    assert describe(Segmentation(nothing, 0.33 * values, 0.67, True, NO_PIXEL)) == (
        "nothing found: the highest probability is 0.33, the threshold 0.5"
    )
    assert "fewer pixels pass" in describe(Segmentation(nothing, values, 0.0, True, NO_PIXEL))
    assert describe(Segmentation(nothing, values, 0.9, True, NO_TARGET)).startswith("nothing found: probability that")


def test_a_broken_image_among_many_is_named_and_the_rest_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    scene = np.zeros((30, 40), np.uint8)
    scene[5:20, 10:30] = 255
    paths = [str(tmp_path / f"{i}.png") for i in range(4)]
    for path in paths:
        Image.fromarray(scene).save(path)
    whole = Path(paths[1]).read_bytes()
    Path(paths[1]).write_bytes(whole[: len(whole) // 2])
    with PredictionFolder(tmp_path / "out", paths, ["bright", "it"], "stand-in") as output:
        failures = predict(predictor(), paths, ["bright", "it"], output, write=["masks"])
    assert len(failures) == 1
    assert f"{paths[1]} cannot be read as an image" in capsys.readouterr().err
    rows = [json.loads(line) for line in output.rows_file.read_text().splitlines()]
    assert [(r["image"], r["sentence"]) for r in rows] == [
        (p, s) for i, p in enumerate(paths) if i != 1 for s in ("bright", "it")
    ]
    mask = np.asarray(Image.open(rows[0]["mask"])) > 0
    assert mask.shape == (30, 40)
    assert np.array_equal(coco.decode(rows[0]["rle"]).astype(bool), mask)
    assert rows[0]["area"] == mask.sum() > 200
    assert rows[0]["confidence_of"] == INSIDE
    assert rows[0]["checkpoint"] == "stand-in"
    assert not (tmp_path / "out" / "overlays").exists()


def test_sentences_come_from_flags_and_a_file(tmp_path: Path) -> None:
    (tmp_path / "s.txt").write_text("the dog\n\n the cat \nred\n")
    assert read_sentences(["red", "red"], str(tmp_path / "s.txt")) == ["red", "the dog", "the cat"]
    blank = tmp_path / "blank.txt"
    blank.write_text("\n \n")
    for given, file, message in (
        ([], None, "no sentence"),
        ([], str(blank), r"blank\.txt has no sentence"),
        ([" "], None, "empty"),
        (["x"], "none", "none cannot be"),
    ):
        with pytest.raises(UserError, match=message):
            read_sentences(given, file)


@pytest.mark.parametrize("flags", [["--batch_size", "0"], ["--overlay_side", "-1"]])
def test_bad_numbers_are_rejected_first(flags: list[str]) -> None:
    args = command.build_parser().parse_args(["--checkpoint", "x", "--image", "y", "--sentence", "z", *flags])
    with pytest.raises(UserError, match="--batch_size must be"):
        predict_images.run(args)
