"""Drawings of alignment diagnostics: curves of the statistics, heat maps of scores, masked images."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from amltrain.methods.aml.statistics import TAUS
from amltrain.methods.blocks import spread_blocks
from amltrain.records import Batch

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PANELS = (
    ("alignment scores", ("score_mean", "score_std", "above_0.5", "above_0.9")),
    ("share of patches below", tuple(f"below_{tau}" for tau in TAUS)),
    ("share of the referents below", tuple(f"referent_below_{tau}" for tau in TAUS)),
    ("share masked", ("masked_image", "masked_referent", "masked_background")),
    ("does the score find the referent (0.5 = no)", ("auc", "auc_shuffled")),
    ("agreement of two projections", ("agreement",)),
)


class FixedSamples(NamedTuple):
    """Samples drawn again and again: a batch on the task's device, its images [H, W, 3] uint8 RGB, its sentences."""

    batch: Batch
    images: Sequence[NDArray[np.uint8]]
    sentences: Sequence[str]


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

    scores [B, h, w], blocks [B, r, c] bool as an AMLTask built with `diagnostics` returns them; all on any device.
    block: side of a block, pixels.
    """
    target = samples.batch.target.cpu()
    size = (target.shape[-2], target.shape[-1])
    masked = spread_blocks(blocks.cpu(), size, block)
    count = len(samples.images)
    figure = _figure(10, 3.4 * count)
    for i, row in enumerate(figure.subplots(count, 3, squeeze=False)):
        image = samples.images[i]
        row[0].imshow(image)
        row[0].contour(target[i].numpy(), levels=[127.5], colors="lime", linewidths=1.2)
        row[0].set_title(samples.sentences[i], fontsize=10, loc="left", wrap=True)
        row[1].imshow(image.mean(-1), cmap="gray")
        extent = (-0.5, size[1] - 0.5, size[0] - 0.5, -0.5)
        heat = row[1].imshow(scores[i].float().cpu().numpy(), extent=extent, cmap="viridis", vmin=0, vmax=1, alpha=0.75)
        row[1].set_title(f"scores, mean {scores[i].mean():.2f}", fontsize=10)
        figure.colorbar(heat, ax=row[1], fraction=0.046)
        row[2].imshow(image * ~masked[i][..., None].numpy())
        row[2].set_title(f"{masked[i].float().mean():.0%} masked", fontsize=10)
        for axes in row:
            axes.set_axis_off()
    figure.savefig(path, dpi=90)


def _figure(width: float, height: float) -> "Figure":
    """A figure of so many inches, without display or global state."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # a second, which no run without pictures needs
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure
