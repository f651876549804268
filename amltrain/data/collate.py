"""Collate samples into a batch."""

from collections.abc import Sequence

import torch

from amltrain.records import Batch, Sample


def collate(samples: Sequence[Sample]) -> Batch:
    """Stack samples into a batch; images stay uint8, and masks at the images' own sizes a tuple, as sizes differ."""
    return Batch(
        image=torch.stack([sample.image for sample in samples]),
        input_ids=torch.stack([sample.input_ids for sample in samples]),
        text_mask=torch.stack([sample.text_mask for sample in samples]),
        target=torch.stack([sample.target for sample in samples]),
        no_target=torch.stack([sample.no_target for sample in samples]),
        sample_id=torch.stack([sample.sample_id for sample in samples]),
        random_key=torch.stack([sample.random_key for sample in samples]),
        geometry=torch.stack([sample.geometry for sample in samples]),
        original_target=tuple(s.original_target for s in samples if s.original_target is not None),
    )
