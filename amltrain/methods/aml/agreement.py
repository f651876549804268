"""How far masks from a smaller stage 1 (`aml.stage1_size`) agree with those of the full size, on a trained model."""

from collections.abc import Iterable
from dataclasses import replace
from typing import NamedTuple

import torch
import torch.nn.functional as F

from amltrain.methods.aml.masker import build_alignment_masker
from amltrain.methods.aml.options import AMLOptions, of_finished_model, resolve
from amltrain.models.base import RISModel
from amltrain.records import Batch


class Agreement(NamedTuple):
    """blocks: share of blocks decided alike; iou: of the two sets of masked blocks; correlation: of the two score maps
    at the smaller one's size; masked_full, masked_small: share of blocks masked."""

    blocks: float
    iou: float
    correlation: float
    masked_full: float
    masked_small: float


@torch.no_grad()
def stage1_agreement(
    model: RISModel, batches: Iterable[Batch], size: int, options: AMLOptions | None = None
) -> Agreement:
    """Compare scoring at full size with scoring at `size` pixels, each with its own solved temperature.

    batches: on the model's device; all are used for both. A block's random number is the same in both, so blocks differ
    only where scores do.
    """
    settings = of_finished_model(resolve(options or AMLOptions()))
    batches = list(batches)
    device = batches[0].image.device
    maskers = []
    for side in (None, size):
        masker = build_alignment_masker(model, replace(settings, stage1_size=side)).to(device)
        if masker.needs_calibration:
            masker.calibrate(model, batches)
        maskers.append(masker)
    full, small = ([masker.score(model, batch) for batch in batches] for masker in maskers)
    masks = [
        torch.cat([maskers[0].blocks(s, b) for s, b in zip(scores, batches, strict=True)]) for scores in (full, small)
    ]
    grid = (small[0].shape[-2], small[0].shape[-1])
    coarse = torch.cat([F.adaptive_avg_pool2d(scores[:, None], grid)[:, 0] for scores in full])
    pair = torch.stack([coarse.flatten(), torch.cat(small).flatten()])
    both, either = (masks[0] & masks[1]).sum(), (masks[0] | masks[1]).sum()
    return Agreement(
        blocks=(masks[0] == masks[1]).float().mean().item(),
        iou=(both / either.clamp(min=1)).item() if either else 1.0,
        correlation=torch.corrcoef(pair)[0, 1].item(),
        masked_full=masks[0].float().mean().item(),
        masked_small=masks[1].float().mean().item(),
    )
