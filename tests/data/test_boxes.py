"""A referent's box at the network's size: annotated where it can be, around the mask elsewhere."""

import numpy as np
import pytest
import torch
from PIL import Image

from amltrain.data.augment import RawSample, build_augmentations
from amltrain.data.augmentations import (
    FlipOptions,
    LabelNoiseOptions,
    ResizeCropOptions,
    ScaleJitterOptions,
)
from amltrain.data.boxes import network_box
from amltrain.data.dataset import OpenSplit, ReferDataset
from amltrain.data.loaders import collate
from amltrain.data.transforms import ImageTransform
from amltrain.matching import boxes_of_masks
from amltrain.records import Draw
from tests.data.stand_in import shapes_dataset, word_tokenizer
from tests.data.test_dataset import jpeg, referent, rows_in_memory

POLYGON = [[10.0, 8.0, 30.0, 8.0, 30.0, 24.0, 10.0, 24.0]]
BOX = [9.5, 7.25, 21.0, 17.5]
"""As annotated by hand: a little larger than the mask; the image has 50 x 40 pixels."""


def dataset(box: list[float] | None = None, resize: str = "square", **options: object) -> ReferDataset:
    row = referent(1, ["the red one"], polygons=POLYGON) | {"bbox": BOX if box is None else box}
    split = OpenSplit("own", "train", rows_in_memory([jpeg()], [[row, referent(2, ["no such thing"])]]))
    return ReferDataset([split], ImageTransform(100, resize), word_tokenizer(), boxes=True, **options)


def box_of(sample: object) -> list[float]:
    assert sample.box.dtype == torch.float32
    return sample.box.tolist()


@pytest.mark.parametrize(
    ("resize", "expected"),
    [
        ("square", [19.0, 7.25 * 2.5, 61.0, 24.75 * 2.5]),
        ("longest", [19.0, 14.5, 61.0, 49.5]),
        ("letterbox", [18.5, 24.0, 60.5, 59.0]),
    ],
)
def test_the_annotated_box_goes_through_the_resize(resize: str, expected: list[float]) -> None:
    """Letterbox maps indices of pixels without a half-pixel shift: index -> 2 * index, and 10 more along y."""
    sample = dataset(resize=resize)[0]
    assert box_of(sample) == pytest.approx(expected, abs=1e-4)
    around = boxes_of_masks(sample.target[None] >= 128)[0]
    assert (sample.box[:2] <= around[:2] + 1).all() and (sample.box[2:] >= around[2:] - 1).all()


def test_a_row_without_a_box_gets_the_one_around_its_mask() -> None:
    without = dataset([])
    assert box_of(without[0]) == boxes_of_masks(without[0].target[None] >= 128)[0].tolist()
    assert without.box_origin() == "annotated; around the mask for 1 refs without one"
    assert dataset().box_origin() == "annotated"
    assert box_of(dataset([3, 3, 0, 5])[0]) == box_of(without[0])
    assert box_of(dataset([60, 3, 10, 5])[0]) == box_of(without[0])  # outside the picture


def test_no_target_has_a_box_of_zeros() -> None:
    assert box_of(dataset()[1]) == [0, 0, 0, 0]


def test_only_a_model_that_asks_gets_boxes(prepared: str) -> None:
    plain, boxed = shapes_dataset(prepared), shapes_dataset(prepared, boxes=True)
    assert plain[0].box is None and plain.box_origin() == ""
    assert collate([plain[0], plain[1]]).box is None
    batch = collate([boxed[0], boxed[1]])
    assert batch.box.shape == (2, 4)
    assert batch.mapped(lambda value: value[1:]).box.tolist() == batch.box[1:].tolist()
    for one, other in zip(plain[3]._replace(box=None), boxed[3]._replace(box=None), strict=True):
        assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


def augmented(name: str, options: object, index: int = 0) -> tuple[object, RawSample]:
    made = dataset(augmentations=build_augmentations([name], {name: options}), seed=3)
    draw = Draw(0, index)
    return made[draw], made._augmented(draw, made._referent(index), 0)


def test_a_flip_mirrors_the_annotated_box() -> None:
    sample, _ = augmented("flip", FlipOptions(probability=1.0))
    assert box_of(sample) == pytest.approx([100 - 61.0, 7.25 * 2.5, 100 - 19.0, 24.75 * 2.5], abs=1e-4)


def test_a_crop_cuts_the_annotated_box() -> None:
    """The frame may cut what the box has beyond the mask; the rest is exact."""
    sample, raw = augmented("resize_crop", ResizeCropOptions(probability=1.0))
    rows, columns = np.flatnonzero(raw.mask.any(1)), np.flatnonzero(raw.mask.any(0))
    left, top = columns[0] - 0.5, rows[0] - 0.75  # the mask starts at 10, 8 and the box at 9.5, 7.25
    assert raw.corners[:2] == pytest.approx((left, top))
    height, width = raw.mask.shape
    expected = [
        max(left, 0) / width,
        max(top, 0) / height,
        min(left + 21, width) / width,
        min(top + 17.5, height) / height,
    ]
    assert box_of(sample) == pytest.approx([100 * value for value in expected], abs=1e-3)


def test_scale_jitter_moves_the_annotated_box_with_the_mask() -> None:
    sample, raw = augmented("scale_jitter", ScaleJitterOptions(smallest=0.6, largest=0.6))
    columns = np.flatnonzero(raw.mask.any(0))
    assert raw.corners[2] - raw.corners[0] == pytest.approx(0.6 * 21)
    assert raw.corners[0] == pytest.approx(columns[0] - 0.3, abs=1)
    around = boxes_of_masks(sample.target[None] >= 128)[0]
    assert (sample.box - around).abs().max() < 4


def test_a_replaced_mask_has_its_own_box() -> None:
    sample, _ = augmented("label_noise", LabelNoiseOptions(share=1.0, kind="shift"))
    assert box_of(sample) == boxes_of_masks(sample.target[None] >= 128)[0].tolist()


def test_an_augmentation_that_does_not_move_boxes_loses_them() -> None:
    mask = np.zeros((4, 4), np.uint8)
    mask[1:3, 1:2] = 1
    sample = dataset().raw(0)
    assert sample.corners == (9.5, 7.25, 30.5, 24.75)
    assert sample.moved(Image.new("RGB", (4, 4)), lambda pixels: mask).corners is None
    assert sample._replace(mask=mask).corners is None
    assert sample._replace(sentence="other").corners is not None


def test_presized_targets_need_no_mask() -> None:
    target = torch.zeros(10, 10, dtype=torch.uint8)
    target[2:5, 3:9] = 255
    geometry = torch.tensor([20.0, 40.0, 0.5, 0.25, 0.0, 0.0], dtype=torch.float64)
    assert network_box(None, target, geometry).tolist() == [3, 2, 9, 5]
    assert network_box((4.0, 2.0, 8.0, 90.0), target, geometry).tolist() == [1, 1, 2, 10]


LEFT, RIGHT = ([[x, 8.0, x + 12, 8.0, x + 12, 24.0, x, 24.0]] for x in (5.0, 30.0))


def several(*alone: int, **options: object) -> ReferDataset:
    """A picture with one referent of two objects, and others that mean those in `alone` by themselves."""
    both = referent(3, ["both of them"], polygons=[*LEFT, *RIGHT]) | {"ann_ids": [1, 2]}
    shapes = {1: LEFT, 2: RIGHT}
    rows = [both, *(referent(number, [f"number {number}"], polygons=shapes[number]) for number in alone)]
    split = OpenSplit("own", "train", rows_in_memory([jpeg()], [rows]))
    return ReferDataset([split], ImageTransform(100), word_tokenizer(), instances=True, **options)


def test_objects_that_others_mean_alone_come_one_by_one() -> None:
    data = several(1, 2)
    both, left, right = data[0], data[1], data[2]
    assert [part.tolist() for part in both.instances] == [left.target.tolist(), right.target.tolist()]
    assert torch.equal(torch.stack(both.instances).amax(0), both.target)
    assert left.instances == () and collate([left, right]).instances is None
    batch = collate([left, both])
    assert batch.instances.shape == (2, 2, 100, 100)
    assert torch.equal(batch.instances[0, 0], left.target) and not batch.instances[0, 1].any()
    assert batch.mapped(lambda value: value[1:]).instances.shape == (1, 2, 100, 100)
    assert data.instance_origin() == "one by one for 1 of 1 referents with several objects"


def test_objects_that_nobody_means_alone_are_one() -> None:
    data = several(1)
    assert data[0].instances == ()
    assert "0 of 1 referents with several objects; 1 are taken as one" in data.instance_origin()
    assert dataset().instance_origin() == ""  # the model does not ask


def test_objects_move_with_the_mask() -> None:
    flip = build_augmentations(["flip"], {"flip": FlipOptions(probability=1.0)})
    sample = several(1, 2, augmentations=flip)[Draw(0, 0)]
    assert torch.equal(torch.stack(sample.instances).amax(0), sample.target)
    first, second = (part.nonzero()[:, 1].float().mean() for part in sample.instances)
    assert first > second  # the left one is on the right now
    noise = build_augmentations(["label_noise"], {"label_noise": LabelNoiseOptions(share=1.0, kind="shift")})
    assert several(1, 2, augmentations=noise)[Draw(0, 0)].instances == ()
