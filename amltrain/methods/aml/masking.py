"""AFM, Alignment-aware Filtering Mask: mask image blocks with low alignment scores (arXiv 2602.22740, 3.3).

Scores are upsampled to the image; pixels below tau are weak; a random share rho of the weak pixels is selected; a block
of 32 x 32 pixels is masked. Which blocks is what `selection` decides:

pixel     any block with a selected pixel (the paper's equations)
patch     a share rho of the weak blocks, at least one
released  what the public code does: of a selected pixel, the number of its patch AND its offset inside the patch are
          both read as patch numbers, so nearly everything is masked as soon as a few patches are weak

Nothing here waits for the device, and all randomness comes from each sample's `random_key`: the same sample in the same
step is masked alike on any number of processes, in any batch, after any resume.

Dimensions: B batch, H W image, h w score map, r c rows and columns of blocks (the last may stick out of the image).

When masking starts, and how it grows (ours): a function of the step, so a resumed run has the same.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from amltrain.randomness import uniform

Number = float | Tensor
"""A number, or a tensor [] on the scores' device where it changes during training."""
Selection = Literal["pixel", "patch", "released"]
SELECT, PLACE, AMOUNT = 0, 1, 2
"""Streams of random numbers: which weak spots are taken; where random blocks lie; how many `random_blocks` hides."""


def weak_pixels(scores: Tensor, size: tuple[int, int], tau: Number) -> Tensor:
    """Scores [B, h, w] -> [B, H, W] bool: the score, upsampled bilinearly, is below tau. NaN is not weak."""
    return F.interpolate(scores[:, None].float(), size, mode="bilinear", align_corners=False)[:, 0] < tau


def split_blocks(pixels: Tensor, block: int) -> Tensor:
    """[B, H, W] bool -> [B, r, c, block, block] bool; what sticks out of the image is False."""
    height, width = pixels.shape[-2:]
    padded = F.pad(pixels, (0, -width % block, 0, -height % block))
    return padded.unflatten(2, (-1, block)).unflatten(1, (-1, block)).transpose(2, 3)


def select_by_pixel(weak: Tensor, rho: Number, keys: Tensor) -> Tensor:
    """Blocks with a selected pixel, every weak pixel being selected with probability rho on its own.

    weak [B, r, c, p, p] bool, keys [B] int64 -> [B, r, c] bool. A block with k weak pixels is hit with probability
    `1 - (1 - rho)^k`, so one random number per block replaces one per pixel.
    """
    count = weak.sum(dim=(-2, -1))  # [B, r, c]
    hit = 1.0 - (1.0 - rho) ** count.float()
    return uniform(keys, count[0].numel(), SELECT).view_as(hit) < hit


def take_share(candidates: Tensor, share: Number, order: Tensor) -> Tensor:
    """Select the first `max(1, floor(share * K))` of each row's K candidates in `order`; none if K or share is 0.

    candidates [B, M] bool, order [B, M] float (ties go to the lower index) -> [B, M] bool.
    """
    count = candidates.sum(dim=1, keepdim=True)
    # 1e-4 keeps products such as 0.29 * 100 from falling to 28
    wanted = (share * count + 1e-4).floor()
    least = (share > 0).to(wanted.dtype) if isinstance(share, Tensor) else float(share > 0)
    wanted = wanted.clamp(min=least)  # a number or a tensor
    rank = order.masked_fill(~candidates, torch.inf).argsort(dim=1, stable=True).argsort(dim=1)
    return candidates & (rank < wanted)


def block_scores(scores: Tensor, grid: tuple[int, int]) -> Tensor:
    """Mean score of every block: scores [B, h, w] -> [B, r, c]."""
    return scores if scores.shape[-2:] == grid else F.adaptive_avg_pool2d(scores[:, None], grid)[:, 0]


def lowest_blocks(scores: Tensor, grid: tuple[int, int], share: float, keys: Tensor) -> Tensor:
    """Exactly `round(share * blocks)` blocks of the lowest mean scores (ours, `aml.share`); equal ones in random order.

    scores [B, h, w], keys [B] int64 -> [B, r, c] bool. NaN counts as the highest score.
    """
    means = block_scores(scores, grid).flatten(1).nan_to_num(nan=torch.inf)
    shuffled = uniform(keys, means.shape[1], SELECT).argsort(dim=1)
    order = shuffled.gather(1, means.gather(1, shuffled).argsort(dim=1, stable=True))
    rank = order.argsort(dim=1)
    return (rank < round(share * means.shape[1])).unflatten(1, grid)


def select_by_patch(scores: Tensor, grid: tuple[int, int], tau: Number, rho: Number, keys: Tensor) -> Tensor:
    """A share rho of the weak blocks, scores [B, h, w] -> [B, r, c] bool; a block's score is its patches' mean."""
    weak = (block_scores(scores, grid) < tau).flatten(1)
    return take_share(weak, rho, uniform(keys, weak.shape[1], SELECT)).unflatten(1, grid)


def select_as_released(
    weak: Tensor, rho: Number, keys: Tensor | None, permutations: Sequence[Tensor] | None = None
) -> Tensor:
    """The public code's blocks. weak [B, r, c, p, p] bool, keys [B] int64 -> [B, r, c] bool.

    A share rho of the weak pixels, at least one, is drawn. The official code keeps a pair (patch j, offset o inside it)
    per drawn pixel, clamps both to N - 1 where N is the number of patches, and masks every patch whose number occurs
    in either column. The official code needs square images whose side is a multiple of the block; this does not.

    permutations: instead of keys, for each sample its recorded order of its K weak pixels, counted patch by patch, row
    by row inside a patch (torch.randperm(K) in the official code).
    """
    patches, offsets = weak.shape[1] * weak.shape[2], weak.shape[3] * weak.shape[4]
    weak_pairs = weak.reshape(weak.shape[0], patches * offsets)
    if permutations is None:
        assert keys is not None, "either keys or recorded permutations"
        order = uniform(keys, patches * offsets, SELECT)
    else:
        order = torch.zeros(weak_pairs.shape)
        for row, candidates, permutation in zip(order, weak_pairs, permutations, strict=True):
            row[candidates] = permutation.argsort().float()
    drawn = take_share(weak_pairs, rho, order).unflatten(1, (patches, offsets))

    masked = drawn.any(dim=2)  # [B, patches]: the column that means patches
    as_patch = drawn.any(dim=1)  # [B, offsets]: the column that does not
    if offsets < patches:
        as_patch = F.pad(as_patch, (0, patches - offsets))
    masked = masked | torch.cat([as_patch[:, : patches - 1], as_patch[:, patches - 1 :].any(1, keepdim=True)], dim=1)
    return masked.unflatten(1, weak.shape[1:3])


def filtering_mask(
    scores: Tensor,
    size: tuple[int, int],
    keys: Tensor,
    *,
    tau: Number = 0.4,
    rho: Number = 0.25,
    block: int = 32,
    selection: Selection = "pixel",
) -> Tensor:
    """AFM: scores [B, h, w] in 0..1, image size (H, W), keys [B] int64 -> [B, r, c] bool, True = mask this block.

    tau: a number, or one per sample [B, 1, 1].
    """
    if selection == "patch":
        grid = (-(-size[0] // block), -(-size[1] // block))
        return select_by_patch(scores, grid, tau, rho, keys)
    weak = split_blocks(weak_pixels(scores, size, tau), block)
    if selection == "released":
        return select_as_released(weak, rho, keys)
    return select_by_pixel(weak, rho, keys)


def relocate(blocks: Tensor, keys: Tensor) -> Tensor:
    """Move each sample's blocks to random places (ablation `level: random`). [B, r, c] bool -> the same."""
    flat = blocks.flatten(1)
    return _at_random_places(flat.sum(dim=1), flat.shape[1], keys).view_as(blocks)


def random_blocks(grid: tuple[int, int], shares: Tensor, keys: Tensor) -> Tensor:
    """Hide a share of the blocks at random places, keys [B] int64 -> [B, r, c] bool.

    shares [K] float32: one is drawn per sample, all equally likely. A share that is no whole number of blocks is
    rounded up or down at random, so its mean is exact.
    """
    count = grid[0] * grid[1]
    draws = uniform(keys, 2, AMOUNT)
    drawn = shares[(draws[:, 0] * len(shares)).long().clamp(max=len(shares) - 1)]
    wanted = (drawn * count + draws[:, 1]).floor()
    return _at_random_places(wanted, count, keys).unflatten(1, grid)


def _at_random_places(wanted: Tensor, count: int, keys: Tensor) -> Tensor:
    """Choose `wanted` [B] of `count` blocks by each sample's key, [B, count] bool."""
    rank = uniform(keys, count, PLACE).argsort(dim=1).argsort(dim=1)
    return rank < wanted[:, None]


class Curriculum(NamedTuple):
    """start_after: steps that mask nothing. ramp_steps: further steps over which `ramp` grows from 0 to its value."""

    start_after: int = 0
    ramp_steps: int = 0
    ramp: Literal["tau", "rho"] = "tau"

    @property
    def changes(self) -> bool:
        """Whether masking depends on the step."""
        return bool(self.start_after or self.ramp_steps)

    def factor(self, step: int) -> float:
        """What `ramp` is multiplied by at optimizer step `step` (from 0), 0..1."""
        done = step - self.start_after
        if done < 0:
            return 0.0
        return min(1.0, (done + 1) / self.ramp_steps) if self.ramp_steps else 1.0
