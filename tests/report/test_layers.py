"""Every layer shows what it stands for, at the size asked for."""

import base64
import io

import numpy as np
from PIL import Image

from amltrain.report.collect import MISSED, RIGHT, WRONG, draw_layers

IMAGE = Image.new("RGB", (60, 40), (100, 100, 100))
TRUTH, PREDICTION = np.zeros((40, 60), bool), np.zeros((40, 60), bool)
TRUTH[10:30, 10:40] = True
PREDICTION[10:30, 20:50] = True


def pixels(uri: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))).convert("RGBA"))


def near(pixel: np.ndarray, colour: tuple[int, int, int]) -> bool:
    return pixel[3] > 150 and np.abs(pixel[:3].astype(int) - colour).max() < 12


def test_errors_have_three_colours() -> None:
    error = pixels(draw_layers(IMAGE, TRUTH, PREDICTION).error)
    assert error.shape == (40, 60, 4)
    assert near(error[20, 30], RIGHT)
    assert near(error[20, 15], MISSED)
    assert near(error[20, 45], WRONG)
    assert error[5, 5, 3] == 0


def test_scores_and_blocks_cover_the_image() -> None:
    scores = np.array([[0, 1]], np.float32)
    layers = draw_layers(IMAGE, TRUTH, PREDICTION, scores, np.array([[True, False]]))
    heat, masked = pixels(layers.scores or ""), pixels(layers.masked or "")
    assert heat.shape == masked.shape == (40, 60, 4)
    assert heat[20, 10, 0] < 90 < 200 < heat[20, 50, 0]  # viridis: violet, then yellow
    assert masked[20, 10].tolist() == [0, 0, 0, 255]
    assert masked[20, 50, 3] == 0


def test_a_large_image_is_scaled_down_and_a_method_may_give_less() -> None:
    layers = draw_layers(IMAGE, TRUTH, PREDICTION, side=30)
    assert pixels(layers.image).shape == pixels(layers.truth).shape == (20, 30, 4)
    assert layers.scores is layers.masked is None


def test_the_truth_is_an_outline_so_that_colours_stay() -> None:
    layers = draw_layers(IMAGE, TRUTH, PREDICTION)
    truth, prediction = pixels(layers.truth), pixels(layers.prediction)
    assert truth[10, 20, 3] == prediction[10, 30, 3] == 255
    assert truth[20, 25, 3] == 0 < prediction[20, 35, 3] < 255
