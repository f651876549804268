"""One way to open and save a figure: no display, no global state, PNG or PDF by the name's ending.

Positive and negative activation maps (Figs. 4a and 5): evidence of a model's logits for and against the referent.

The activation of a pixel is the margin of the referent against the background (logit difference); its positive part is
evidence for the referent, its negative part evidence against it. All positive maps of a picture share one scale, and
all negative ones another: a model's margins on the background are often ten times as large as those on the referent.

Predictions of several models side by side, as a figure of a paper.
"""

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from amltrain.errors import UserError
from amltrain.evaluation.draw import PREDICTION, TRUTH, tint
from amltrain.evaluation.masks import referent_margin

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
"""Okabe and Ito's palette, which colour-blind readers can tell apart; used in this order."""


@contextmanager
def saved_figure(path: Path, size: tuple[float, float]) -> "Iterator[Figure]":
    """A figure of this size in inches, written to `path` at the end. Raises UserError when it cannot be written."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    yield figure
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with rc_context({"pdf.fonttype": 42}):  # publishers reject the default, Type 3
            figure.savefig(path, dpi=200)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error


SIGNS = {"positive": 1, "negative": -1}


class Evidence(NamedTuple):
    """margin: [B, H, W] float32 at network size, positive for the referent."""

    margin: Tensor

    def shares(self, row: int, truth: Tensor) -> tuple[float, float]:
        """Shares of the pixels inside and outside the truth ([H, W] bool) with a positive margin; NaN over nothing."""
        positive = self.margin[row] > 0
        return float(positive[truth].float().mean()), float(positive[~truth].float().mean())


def evidence(logits: Tensor, size: Sequence[int]) -> Evidence:
    """Margins of logits [B, 2 or 1, h, w], resized to the network's size (H, W), on the CPU."""
    margin = referent_margin(logits)[:, None]
    size = (size[0], size[1])
    return Evidence(F.interpolate(margin, size, mode="bilinear", align_corners=True)[:, 0].cpu())


def draw_activation(
    images: Sequence[Image.Image],
    sentences: Sequence[str],
    truths: Sequence[Tensor],
    maps: Mapping[str, Evidence],
    path: Path,
) -> None:
    """Draw one row per sample: the image with the true outline, then every model's positive and negative map.

    truths: [H, W] bool at network size; the images are stretched to it.
    """
    largest = {sign: max(_largest(m.margin, sign) for m in maps.values()) for sign in SIGNS}
    columns = 1 + 2 * len(maps)
    with saved_figure(path, (2.4 * columns, 2.7 * len(images))) as figure:
        grid = figure.subplots(len(images), columns, squeeze=False)
        drawn = {}
        for row, image in enumerate(images):
            height, width = truths[row].shape
            picture = np.asarray(image.convert("RGB").resize((width, height)))
            grey = picture.mean(-1)
            grid[row][0].imshow(picture)
            grid[row][0].set_title(sentences[row], fontsize=9, loc="left", wrap=True)
            cells = [(m, sign) for m in maps for sign in SIGNS]
            for axes, (model, sign) in zip(grid[row][1:], cells, strict=True):
                margin = maps[model].margin[row].numpy()
                part = np.clip(SIGNS[sign] * margin, 0, None)
                axes.imshow(grey, cmap="gray", vmin=0, vmax=255)
                colours = "Reds" if sign == "positive" else "Blues"
                alpha = np.clip(part / largest[sign], 0, 1) * 0.85
                drawn[sign] = axes.imshow(part, cmap=colours, vmin=0, vmax=largest[sign], alpha=alpha)
                if row == 0:
                    axes.set_title(f"{model}\n{sign}", fontsize=9)
            for axes in grid[row]:
                if truths[row].any():
                    axes.contour(truths[row].numpy(), levels=[0.5], colors="lime", linewidths=1)
                axes.set_axis_off()
        for sign, mappable in drawn.items():
            figure.colorbar(mappable, ax=grid[:, -1], fraction=0.05, label=f"{sign} logit margin")


def _largest(margin: Tensor, sign: str) -> float:
    """The end of a sign's scale: its 99th percentile, or 1 where no pixel has that sign."""
    part = SIGNS[sign] * margin[SIGNS[sign] * margin > 0].numpy()
    return float(np.percentile(part, 99)) if part.size else 1.0


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
