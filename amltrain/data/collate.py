"""Collate samples into a batch."""

from collections.abc import Sequence

import torch

from amltrain.records import Batch, Sample


def collate(samples: Sequence[Sample]) -> Batch:
    """Stack samples into a batch; images stay uint8, and masks at the images' own sizes a tuple, as sizes differ."""
    *stacked, originals = zip(*samples, strict=True)
    masks = tuple(mask for mask in originals if mask is not None)
    return Batch(*map(torch.stack, stacked), original_target=masks)  # type: ignore[arg-type, call-arg, misc]
