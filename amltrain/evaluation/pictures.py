"""A sheet of the predictions that an evaluation kept."""

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from amltrain.errors import UserError
from amltrain.evaluation.results import Prediction, Results
from amltrain.evaluation.visualize import Example, sheet


def prediction_sheet(results: Results, dataset: Any, columns: int = 2) -> Image.Image:
    """Sentence, truth and prediction of every kept sample.

    dataset: the one evaluated; `picture(sample_id)` gives the RGB image, `info(sample_id)` the sentence.
    """
    return sheet([_example(p, dataset) for p in results.predictions], columns)


def save_picture(picture: Image.Image, path: Path) -> None:
    """Write a PNG. Raises UserError when it cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.save(path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error


def _example(prediction: Prediction, dataset: Any) -> Example:
    image, sentence = dataset.picture(prediction.sample_id), dataset.info(prediction.sample_id).sentence
    return Example(image, sentence, prediction.mask, prediction.truth, _note(prediction))


def _note(prediction: Prediction) -> str:
    if prediction.predicted_no_target:
        return '"nothing in this image"' + ("" if prediction.truth.any() else ", right")
    union = np.count_nonzero(prediction.mask | prediction.truth)
    if not prediction.truth.any():
        return "nothing was meant"
    return f"IoU {100 * np.count_nonzero(prediction.mask & prediction.truth) / union:.1f}"
