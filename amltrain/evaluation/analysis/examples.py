"""Predictions of several models side by side, as a figure of a paper."""

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from amltrain.evaluation.analysis.figures import saved_figure
from amltrain.evaluation.visualize import PREDICTION, TRUTH, tint

WIDTH = 2.2
"""Of a panel, inches."""
LEAST_SIDE = 600
"""Smaller images are enlarged to this many pixels, so that outlines are sharp; larger ones keep their size."""


class PaperExample(NamedTuple):
    """One row. image: RGB at its own size; truth and predictions (by model): [height, width] bool at that size."""

    image: Image.Image
    sentence: str
    truth: NDArray[np.bool_]
    predictions: Mapping[str, NDArray[np.bool_]]


def iou(prediction: NDArray[np.bool_], truth: NDArray[np.bool_]) -> float:
    """IoU in percent; 100 where both are empty."""
    union = np.count_nonzero(prediction | truth)
    return 100 * np.count_nonzero(prediction & truth) / union if union else 100.0


def draw_examples(examples: Sequence[PaperExample], path: Path) -> None:
    """Image, truth (outline alone) and every model's prediction with its IoU, one row per example, and a legend.

    path: PNG, or PDF with the images at their own resolution.
    """
    from matplotlib.patches import Patch

    models = list(examples[0].predictions)
    columns = 2 + len(models)
    heights = [WIDTH * e.image.height / e.image.width + 0.25 * len(_lines(e.sentence)) for e in examples]
    with saved_figure(path, (WIDTH * columns, sum(heights) + 0.7)) as figure:
        grid = figure.subplots(len(examples), columns, squeeze=False, height_ratios=heights)
        for row, e in zip(grid, examples, strict=True):
            side = max(LEAST_SIDE, *e.image.size)
            plain = e.image.convert("RGB")
            row[0].imshow(plain, interpolation="none")
            row[0].set_title("\n".join(_lines(e.sentence)), fontsize=9, loc="left")
            row[1].imshow(tint(plain, e.truth, TRUTH, opacity=0, side=side), interpolation="none")
            for axes, prediction in zip(row[2:], e.predictions.values(), strict=True):
                axes.imshow(tint(plain, prediction, PREDICTION, side=side), interpolation="none")
                axes.set_xlabel(f"IoU {iou(prediction, e.truth):.1f}", fontsize=8, labelpad=2)
            for axes in row:
                axes.set_xticks([])
                axes.set_yticks([])
                axes.spines[:].set_visible(False)
        for axes, title in zip(grid[0][1:], ("ground truth", *models), strict=True):
            axes.set_title(title, fontsize=9)
        handles = [
            Patch(color=tuple(np.divide(c, 255)), label=t) for c, t in ((TRUTH, "truth"), (PREDICTION, "prediction"))
        ]
        figure.legend(handles=handles, loc="outside lower center", ncols=2, frameon=False, fontsize=9)


def _lines(sentence: str) -> list[str]:
    """The sentence in lines as wide as a panel."""
    return textwrap.wrap(f"\u201c{sentence}\u201d", 28) or [""]
