"""Alignment scores of finished models, for the histogram (Fig. 6) and the dynamics over checkpoints (Tables 12, 13).

The scorer is the paper's: early features, two fixed Gaussian projections, softmax over tokens at a solved temperature.
"""

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from amltrain.methods.aml.masker import build_alignment_masker
from amltrain.methods.aml.options import AMLOptions
from amltrain.methods.aml.presets import resolve
from amltrain.methods.aml.scorers import Scorer
from amltrain.methods.aml.statistics import alignment_sums, summarise
from amltrain.models.base import RISModel
from amltrain.records import Batch

BINS = 20
"""Bins of a histogram over 0..1."""


def paper_scorer(model: RISModel, batches: Sequence[Batch]) -> Scorer:
    """A scorer for the model's early features, its temperature solved on these batches (mean score 0.75).

    Raises UserError when no temperature reaches that mean.
    """
    masker = build_alignment_masker(model, resolve(AMLOptions())).to(batches[0].image.device)
    masker.calibrate(model, batches)
    return masker.scorer


def collect_scores(model: RISModel, scorer: Scorer, batches: Iterable[Batch]) -> list[tuple[Tensor, Tensor]]:
    """(scores [B, h, w] float32, target [B, H, W] uint8) of every batch, on the CPU; the model must be in eval mode."""
    with torch.no_grad():
        return [(scorer(model, b).float().cpu(), b.target.cpu()) for b in batches]


def score_histogram(collected: Sequence[tuple[Tensor, Tensor]]) -> NDArray[np.float64]:
    """Share of the patches in every bin of 0..1, [BINS], summing to 1."""
    values = torch.cat([scores.flatten() for scores, _ in collected]).numpy()
    counts, _ = np.histogram(np.clip(values, 0, 1), bins=BINS, range=(0, 1))
    return counts / max(1, len(values))


def score_statistics(collected: Sequence[tuple[Tensor, Tensor]]) -> dict[str, float]:
    """Mean, deviation and shares of the scores by name (see `STATISTICS`), without those of a mask."""
    sums = [
        alignment_sums(scores, torch.zeros(len(scores), 1, 1, dtype=torch.bool), target, max(target.shape[-2:]))
        for scores, target in collected
    ]
    values = summarise(torch.stack(sums).double().sum(0))
    return {name: value for name, value in values.items() if not name.startswith("masked")}
