"""Samples -> Batch."""

from collections.abc import Sequence

import torch

from amltrain.records import Batch, Sample


def collate(samples: Sequence[Sample]) -> Batch:
    """Stack the samples; masks at the images' own sizes stay a tuple, for they differ in size."""
    *stacked, originals = zip(*samples, strict=True)
    masks = tuple(mask for mask in originals if mask is not None)
    return Batch(*map(torch.stack, stacked), original_target=masks)  # type: ignore[arg-type, call-arg, misc]
