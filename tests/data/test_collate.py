"""Samples -> Batch."""

import torch

from amltrain.data.loaders import collate
from amltrain.records import Batch
from tests.data.stand_in import shapes_dataset


def test_every_field_is_stacked_in_order(prepared: str) -> None:
    dataset = shapes_dataset(prepared, "val")
    samples = [dataset[i] for i in (4, 2, 9)]
    batch = collate(samples)
    assert isinstance(batch, Batch)
    assert batch.sample_id.tolist() == [4, 2, 9]
    empty = ("original_target", "regions", "loss_weight", "view", "conversation", "box", "view_geometry", "instances")
    filled = [name for name in Batch._fields if name not in empty]
    for name in filled:
        assert torch.equal(getattr(batch, name), torch.stack([getattr(s, name) for s in samples])), name
    assert batch.original_target == ()
    assert all(getattr(batch, name) is None for name in empty[1:])
    shapes = [(f, tuple(getattr(batch, f).shape), getattr(batch, f).dtype) for f in filled]
    assert shapes == [
        ("image", (3, 3, 32, 32), torch.uint8),
        ("input_ids", (3, 12), torch.int64),
        ("text_mask", (3, 12), torch.bool),
        ("target", (3, 32, 32), torch.uint8),
        ("no_target", (3,), torch.bool),
        ("sample_id", (3,), torch.int64),
        ("random_key", (3,), torch.int64),
        ("geometry", (3, 6), torch.float64),
    ]


def test_masks_at_their_own_sizes_stay_apart(prepared: str) -> None:
    dataset = shapes_dataset(prepared, "val", keep_original_target=True)
    batch = collate([dataset[0], dataset[1]])
    assert [tuple(mask.shape) for mask in batch.original_target] == [(48, 48), (48, 48)]
    assert set(batch.original_target[0].unique().tolist()) == {0, 255}
