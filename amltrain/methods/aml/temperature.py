"""The temperature of PMME's softmax, solved so that the mean score over the first batches is the paper's.

With independent projections, `<Wi v, Wt t>` of unit vectors has mean 0 and variance 1/D whatever v and t are. Taken
literally (temperature 1) every score is therefore about 1/L, all of the image falls under tau and is masked. The
published mean score, 0.754 in epoch 1, fixes the temperature instead; it comes out near 1/5 of the logits' spread.
"""

import math
import warnings
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from amltrain.errors import UserError
from amltrain.methods.aml.similarity import patch_max

TARGET_MEAN_SCORE = 0.75
Reduce = Callable[[Tensor], Tensor]
Scored = tuple[Tensor, Tensor | None]


class Calibration(NamedTuple):
    """temperature, the mean score it gives over all ranks, and the number of patches on this rank."""

    temperature: float
    mean_score: float
    patches: int


def mean_score(scored: Sequence[Scored], temperature: float, reduce: Reduce | None = None) -> float:
    """Mean PMME score of pairs (logits [B, N, L], text mask [B, L] or None) at a temperature, over all ranks.

    reduce: sums or averages a tensor over the ranks, e.g. `accelerator.reduce`; None = there is one rank.
    """
    scores = [patch_max(logits.double(), temperature, mask) for logits, mask in scored]
    totals = torch.stack(
        [torch.stack([s.sum() for s in scores]).sum(), scores[0].new_tensor(sum(map(Tensor.numel, scores)))]
    )
    if reduce is not None:
        # float32, which every backend reduces; every rank then sees the same two numbers
        totals = reduce(totals.float()).double()
    return (totals[0] / totals[1]).item()


def solve_temperature(
    scored: Sequence[Scored], target: float = TARGET_MEAN_SCORE, reduce: Reduce | None = None
) -> Calibration:
    """Bisect for the temperature at which the mean score is `target`: the mean falls as the temperature rises.

    Every rank must call this with as many iterations as the others; it makes the same number of reductions always.
    Raises UserError when no temperature reaches the target (features without any contrast, one-token sentences).
    """
    low, high = math.log(1e-6), math.log(1e6)
    for _ in range(50):
        middle = (low + high) / 2
        if mean_score(scored, math.exp(middle), reduce) > target:
            low = middle
        else:
            high = middle
    temperature = math.exp((low + high) / 2)
    reached = mean_score(scored, temperature, reduce)
    if not abs(reached - target) < 0.01:
        raise UserError(
            f"no temperature gives a mean alignment score of {target} (closest: {reached:.3f}); the features are "
            "constant, not finite, or the sentences have one token: set aml.temperature to a number"
        )
    return Calibration(temperature, reached, sum(logits.shape[0] * logits.shape[1] for logits, _ in scored))


def warn_if_literal(temperature: float, normalize: bool) -> None:
    """Warn about the literal formula, which masks whole images."""
    if temperature == 1.0 and normalize:
        warnings.warn(
            "aml.temperature=1.0 takes the paper's formula literally: scores of unit vectors are then all "
            "about 1 / tokens, everything is under tau and whole images are blanked; use aml.temperature=auto",
            stacklevel=2,
        )
