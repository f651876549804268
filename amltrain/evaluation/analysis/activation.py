"""Positive and negative activation maps (Figs. 4a and 5): evidence of a model's logits for and against the referent.

The activation of a pixel is the margin of the referent against the background (logit difference); its positive part is
evidence for the referent, its negative part evidence against it. All positive maps of a picture share one scale, and
all negative ones another: a model's margins on the background are often ten times as large as those on the referent.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from amltrain.evaluation.analysis.figures import saved_figure
from amltrain.evaluation.masks import referent_margin

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
