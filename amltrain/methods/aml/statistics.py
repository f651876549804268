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
    "masked_background",
    "auc",
    "auc_shuffled",
    "agreement",
)


def alignment_sums(
    scores: Tensor,
    blocks: Tensor,
    target: Tensor,
    block: int,
    shuffled: Tensor | None = None,
    other: Tensor | None = None,
) -> Tensor:
    """Numerators and denominators of `STATISTICS`, [K, 2] float32, detached.

    scores [B, h, w]; blocks [B, r, c] bool, the masked ones; target [B, H, W] uint8, 255 = referent.
    score_mean, score_square, below_T, above_T are over patches; referent_below_T is the share of the referents' area
    in patches scored under T (the paper's mask-on-ground-truth coverage); masked_image, masked_referent and
    masked_background are the shares of all pixels, of the referents' pixels and of the others that are masked.
    auc: see `referent_auc`; auc_shuffled: of `shuffled`, the scores with other samples' sentences. agreement:
    correlation with `other`, the scores of other projections, over the patches of an image. Both as `scores`; None
    counts nothing.
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
    rows += [(((1 - referent) * masked).sum(), (1 - referent).sum())]
    nothing = (torch.zeros_like(area), torch.zeros_like(area))
    grid = (blocks.shape[-2], blocks.shape[-1])
    rows += [nothing if s is None else referent_auc(s, referent, grid) for s in (scores, shuffled)]
    rows += [nothing if other is None else correlation(scores, other)]
    return torch.stack([torch.stack([part.float() for part in row]) for row in rows])


def referent_auc(scores: Tensor, referent: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Sum over images of the chance that a patch of the referent scores above a patch of the background; their number.

    scores [B, h, w], referent [B, H, W] in 0..1. A map finer than `grid`, the blocks, is averaged to it first. The
    referent's patches are covered at least half as much as the most covered one; the background's are not covered at
    all; others count for neither. 0.5 = the score does not tell them apart. Images without one of the two are left out.
    """
    if scores.shape[-2] * scores.shape[-1] > grid[0] * grid[1]:
        scores = F.adaptive_avg_pool2d(scores[:, None].float(), grid)[:, 0]
    scores = scores.detach().float()
    covered = F.adaptive_avg_pool2d(referent[:, None], (scores.shape[-2], scores.shape[-1])).flatten(1)
    most = covered.amax(dim=1, keepdim=True)
    positive, negative = (covered >= most / 2) & (most > 0), covered == 0
    values = scores.flatten(1)
    above = (values[:, :, None] > values[:, None]).float() + 0.5 * (values[:, :, None] == values[:, None]).float()
    pairs = (positive[:, :, None] & negative[:, None]).float()
    number = pairs.sum(dim=(1, 2))
    auc = (above * pairs).sum(dim=(1, 2)) / number.clamp(min=1)
    return auc.sum(), (number > 0).sum().float()


def correlation(scores: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """Sum over images of the correlation of two maps [B, h, w] over their patches, and the number of images."""
    a, b = (maps.detach().float().flatten(1) for maps in (scores, other))
    a, b = (F.normalize(maps - maps.mean(dim=1, keepdim=True), dim=1) for maps in (a, b))
    return (a * b).sum(), torch.full_like(a[0, 0], float(len(a)))


def summarise(sums: Tensor) -> dict[str, float]:
    """Ratios by name from added-up `alignment_sums`; score_square becomes score_std, and referent_ratio says how much
    more often the referent is masked than the background. NaN where nothing was counted."""
    numbers: Sequence[Sequence[float]] = sums.double().tolist()
    values = {
        name: top / bottom if bottom else float("nan") for name, (top, bottom) in zip(STATISTICS, numbers, strict=True)
    }
    mean, square = values["score_mean"], values.pop("score_square")
    background = values["masked_background"]
    ratio = values["masked_referent"] / background if background else float("nan")
    return {"score_mean": mean, "score_std": max(square - mean**2, 0.0) ** 0.5, **values, "referent_ratio": ratio}
