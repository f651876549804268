"""Drawings of alignment diagnostics: curves of the statistics, heat maps of scores, masked images."""

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from amltrain.methods.aml.masking import weak_pixels
from amltrain.methods.aml.statistics import TAUS
from amltrain.methods.blocks import spread_blocks
from amltrain.records import Batch

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

REFERENT, WEAK = "lime", "#ff4fa3"
PANELS = (
    ("alignment scores", ("score_mean", "score_std", "above_0.5", "above_0.9")),
    ("share of patches below", tuple(f"below_{tau}" for tau in TAUS)),
    ("share of the referents below", tuple(f"referent_below_{tau}" for tau in TAUS)),
    ("share masked", ("masked_image", "masked_referent", "masked_background")),
    ("does the score find the referent (0.5 = no)", ("auc", "auc_shuffled")),
    ("agreement of two projections", ("agreement",)),
)


class FixedSamples(NamedTuple):
    """Samples drawn again and again: a batch on the task's device, its images [H, W, 3] uint8 RGB, its sentences.

    tau: threshold of the scores, to outline weak patches; None = no outlines.
    """

    batch: Batch
    images: Sequence[NDArray[np.uint8]]
    sentences: Sequence[str]
    tau: float | None = None


def plot_rows(rows: Sequence[Mapping[str, float]], path: Path) -> None:
    """Statistics over steps, six panels, as a PNG."""
    from matplotlib.ticker import MaxNLocator

    figure = _figure(15, 7)
    for axes, (title, names) in zip(figure.subplots(2, 3).flat, PANELS, strict=True):
        for name in names:
            axes.plot([r["step"] for r in rows], [r[name] for r in rows], marker=".", label=name.replace("_", " "))
        axes.set_title(title)
        axes.set_xlabel("step")
        axes.set_ylim(bottom=0)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    figure.savefig(path, dpi=100)


def draw_alignment(samples: FixedSamples, scores: Tensor, blocks: Tensor, block: int, path: Path) -> None:
    """Draw one row per sample: the image with the referent's outline, its scores (0..1), the image that stage 2 sees.

    All scores share one colour scale, on which tau is marked; pixels below tau are outlined (`FixedSamples.tau`).
    scores [B, h, w], blocks [B, r, c] bool as AML built with `diagnostics_every` returns them; all on any device.
    block: side of a block, pixels.
    """
    from matplotlib.lines import Line2D

    target = samples.batch.target.cpu()
    size = (target.shape[-2], target.shape[-1])
    masked = spread_blocks(blocks.cpu(), size, block)
    scores = scores.detach().float().cpu()
    weak = None if samples.tau is None else weak_pixels(scores, size, samples.tau)
    count = len(samples.images)
    figure = _figure(9, 2.9 * count + 0.4)
    grid = figure.subplots(count, 3, squeeze=False)
    for i, row in enumerate(grid):
        image = samples.images[i]
        row[0].imshow(image)
        row[0].set_title(textwrap.fill(samples.sentences[i], 42), fontsize=9, loc="left")
        row[1].imshow(image.mean(-1), cmap="gray", vmin=0, vmax=255)
        extent = (-0.5, size[1] - 0.5, size[0] - 0.5, -0.5)
        heat = row[1].imshow(scores[i].numpy(), extent=extent, cmap="viridis", vmin=0, vmax=1, alpha=0.8)
        share = "" if weak is None else f", {weak[i].float().mean():.0%} weak"
        row[1].set_title(f"scores, mean {scores[i].mean():.2f}{share}", fontsize=9)
        _outline(row[1], None if weak is None else weak[i], WEAK)
        row[2].imshow(image * ~masked[i][..., None].numpy())
        row[2].set_title(f"stage 2: {masked[i].float().mean():.0%} masked", fontsize=9)
        for axes in row:
            _outline(axes, target[i] > 127, REFERENT)
            axes.set_axis_off()
    bar = figure.colorbar(heat, ax=grid, fraction=0.03, pad=0.02, label="alignment score")
    lines = [Line2D([], [], color=REFERENT, label="referent")]
    if samples.tau is not None:
        bar.ax.axhline(samples.tau, color=WEAK, linewidth=2)
        lines.append(Line2D([], [], color=WEAK, label=f"weak: score below tau = {samples.tau:g}"))
    figure.legend(handles=lines, loc="outside lower center", ncols=len(lines), frameon=False, fontsize=9)
    figure.savefig(path, dpi=110)


def _outline(axes: "Axes", mask: Tensor | None, colour: str) -> None:
    """Outline a mask [H, W] bool; nothing where it is empty, full or None."""
    if mask is not None and mask.any() and not mask.all():
        axes.contour(mask.float().numpy(), levels=[0.5], colors=colour, linewidths=1.3)


def _figure(width: float, height: float) -> "Figure":
    """A figure of so many inches, without display or global state."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # a second, which no run without pictures needs
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure
