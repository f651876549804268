"""Alignment statistics of a batch, as sums that can be added over batches and ranks and divided at the end.

Every statistic is a ratio of two sums. Nothing here waits for the device.

Dimensions: B batch, h w score map, r c blocks, H W image, K statistics.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from amltrain.methods.blocks import spread_blocks

TAUS = (0.2, 0.3, 0.4, 0.6)
LEVELS = (0.5, 0.9)
STATISTICS = (
    "score_mean",
    "score_square",
    *(f"below_{tau}" for tau in TAUS),
    *(f"above_{level}" for level in LEVELS),
    *(f"referent_below_{tau}" for tau in TAUS),
    "masked_image",
    "masked_referent",
)


def alignment_sums(scores: Tensor, blocks: Tensor, target: Tensor, block: int) -> Tensor:
    """Numerators and denominators of `STATISTICS`, [K, 2] float32, detached.

    scores [B, h, w]; blocks [B, r, c] bool, the masked ones; target [B, H, W] uint8, 255 = referent.
    score_mean, score_square, below_T, above_T are over patches; referent_below_T is the share of the referents' area
    in patches scored under T (the paper's mask-on-ground-truth coverage); masked_image and masked_referent are
    the shares of all pixels and of the referents' pixels that are masked.
    """
    scores = scores.detach().float()
    referent = target.float() / 255
    inside = F.adaptive_avg_pool2d(referent[:, None], (scores.shape[-2], scores.shape[-1]))[:, 0]
    masked = spread_blocks(blocks.detach(), (target.shape[-2], target.shape[-1]), block)
    patches, pixels = (torch.full_like(scores[0, 0, 0], float(part.numel())) for part in (scores, target))
    area = inside.sum()
    rows = [(scores.sum(), patches), (scores.square().sum(), patches)]
    rows += [((scores < tau).sum(), patches) for tau in TAUS]
    rows += [((scores >= level).sum(), patches) for level in LEVELS]
    rows += [((inside * (scores < tau)).sum(), area) for tau in TAUS]
    rows += [(masked.sum(), pixels), ((referent * masked).sum(), referent.sum())]
    return torch.stack([torch.stack([part.float() for part in row]) for row in rows])


def summarise(sums: Tensor) -> dict[str, float]:
    """Ratios by name from added-up `alignment_sums`; score_square becomes score_std. NaN where nothing was counted."""
    numbers: Sequence[Sequence[float]] = sums.double().tolist()
    values = {
        name: top / bottom if bottom else float("nan") for name, (top, bottom) in zip(STATISTICS, numbers, strict=True)
    }
    mean, square = values["score_mean"], values.pop("score_square")
    return {"score_mean": mean, "score_std": max(square - mean**2, 0.0) ** 0.5, **values}
