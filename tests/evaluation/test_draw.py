"""Pictures have the masks where they belong and the colours that mean truth and prediction."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image, ImageFilter

from amltrain.evaluation.draw import (
    PREDICTION,
    TRUTH,
    Example,
    best_example,
    overlay,
    save_picture,
    sheet,
    shrink,
    tint,
)
from amltrain.evaluation.results import Prediction, Results
from amltrain.run_folder import CAPTION

IMAGE = Image.new("RGB", (60, 40), (100, 100, 100))
MASK = np.zeros((40, 60), bool)
MASK[10:30, 15:45] = True


def count(picture: Image.Image, colour: tuple[int, int, int]) -> int:
    return int((np.asarray(picture) == colour).all(2).sum())


def test_tint_outlines_and_fills_the_mask_only():
    pixels = np.asarray(tint(IMAGE, MASK))
    assert tuple(pixels[10, 15]) == PREDICTION  # the outline
    inside, outside = pixels[20, 30], pixels[5, 5]
    assert tuple(outside) == (100, 100, 100)
    assert inside[0] > 100 > inside[2]
    changed = (pixels != 100).any(2)
    assert np.array_equal(changed, MASK)


@pytest.mark.parametrize("pixels", [1, 2, 5, 8])
def test_shrinking_is_a_minimum_filter(pixels: int):
    mask = np.asarray(Image.effect_noise((90, 70), 90).filter(ImageFilter.BoxBlur(4))) > 125
    mask = mask | np.pad(np.ones((30, 40), bool), ((0, 40), (20, 30)))
    picture = Image.fromarray(mask.astype(np.uint8)).filter(ImageFilter.MinFilter(2 * pixels + 1))
    assert 0 < np.asarray(picture).sum() < mask.sum()
    assert np.array_equal(shrink(mask, pixels), np.asarray(picture) > 0)


def test_an_overlay_is_as_large_as_asked():
    large, mask = Image.new("RGB", (2000, 1000)), np.ones((1000, 2000), bool)
    assert overlay(large, mask, "x", side=500).width < 600
    assert overlay(large, mask, "x", side=None).width > 2000
    assert 480 <= overlay(IMAGE, MASK, "x").width < 600


def test_the_truth_leaves_colours_as_they_are():
    yellow = Image.new("RGB", (60, 40), (255, 255, 0))
    page = sheet([Example(yellow, "the yellow one", np.zeros_like(MASK), MASK)], side=120)
    within = np.asarray(tint(yellow, MASK, TRUTH, opacity=0))[13:27, 18:42]
    assert (within == (255, 255, 0)).all()
    assert count(page, (255, 255, 0)) > 2 * 120 * 80 * 0.9  # the empty prediction is beside it
    assert count(page, TRUTH) > 100


def test_tint_scales_without_blurring_the_outline():
    big = tint(IMAGE, MASK, side=600)
    assert big.size == (600, 400)
    assert count(big, PREDICTION) > 1000


def test_sheet_shows_truth_and_prediction_side_by_side():
    examples = [Example(IMAGE, "the grey one", MASK, MASK, "IoU 100.0")] * 3
    page = sheet(examples, columns=2, side=120)
    truth, prediction = count(page, TRUTH), count(page, PREDICTION)
    assert truth == prediction > 0
    left = np.flatnonzero((np.asarray(page) == TRUTH).all(2).any(0))[0]
    right = np.flatnonzero((np.asarray(page) == PREDICTION).all(2).any(0))[0]
    assert left < right
    assert page.width > page.height / 2


def test_without_truth_or_examples():
    assert count(sheet([Example(IMAGE, "x", MASK)]), TRUTH) == 0
    assert sheet([]).size == (220, 220)


def test_a_note_is_not_cut_off_on_a_narrow_picture():
    tower, note = Image.new("RGB", (60, 400), (0, 0, 255)), "0.2 % of the image, mean probability inside the mask 0.53"
    picture = np.asarray(overlay(tower, np.zeros((400, 60), bool), "x", note))
    blank = np.asarray(overlay(tower, np.zeros((400, 60), bool), "x"))
    assert picture.shape[0] > blank.shape[0]
    assert (picture[:, -3:] == 255).all()  # no letter reaches the border
    ink = (picture[blank.shape[0] - 10 :] < 250).any(2)
    assert ink.any() and not ink[-1].any()


def test_overlay_of_an_empty_mask_with_a_long_sentence():
    picture = overlay(IMAGE, np.zeros_like(MASK), "wörter " * 80, "nothing in this image")
    assert picture.width >= 480
    assert picture.height > 480 * 40 / 60
    assert count(picture, PREDICTION) == 0


class Pictures:
    """A data set of blank pictures, each with its own sentence."""

    def picture(self, sample_id: int) -> Image.Image:
        return Image.new("RGB", (60, 40), (sample_id, 0, 0))

    def info(self, sample_id: int) -> SimpleNamespace:
        return SimpleNamespace(sentence=f"thing {sample_id}")


def kept(overlaps: list[int]) -> Results:
    """Predictions that share so many of ten columns with their truth."""
    truth = np.zeros((40, 60), bool)
    truth[:, :10] = True
    shifted = [np.roll(truth, 10 - overlap, axis=1) for overlap in overlaps]
    predictions = [Prediction(number, mask, truth, False) for number, mask in enumerate(shifted)]
    return Results("cups", "val", {}, {"samples": len(overlaps)}, {}, predictions=predictions)


def test_the_example_is_the_best_and_a_miss_is_called_one(tmp_path: Path):
    found = best_example(kept([0, 5, 2]), Pictures())
    assert found is not None
    picture, caption = found
    assert caption == "The best of the 3 predictions drawn of cups val: IoU 33.3. Truth left, prediction right."
    save_picture(picture, tmp_path / "deep" / "a.png", caption)
    with Image.open(tmp_path / "deep" / "a.png") as saved:
        assert saved.info[CAPTION] == caption and saved.size == picture.size
    missed = best_example(kept([0, 0]), Pictures())
    assert missed is not None and missed[1].startswith("None of the 2 predictions drawn of cups val overlaps its truth")
    nothing = kept([3])
    nothing.predictions[0].truth[:] = False
    assert best_example(nothing, Pictures()) is None
