"""Segmentations of every kind that COCO files hold, and what is wrong with broken ones."""

from typing import Any

import numpy as np
import pytest
from pycocotools import mask as coco

from amltrain.data.segmentation import BrokenSegmentationError, decode_mask, decode_rle, referent_mask

HEIGHT, WIDTH = 30, 40
SQUARE = [5, 5, 25, 5, 25, 25, 5, 25]
OTHER = [20, 10, 35, 10, 35, 20, 20, 20]


def square_mask() -> np.ndarray:
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    mask[5:25, 5:25] = 1
    return mask


def runs(mask: np.ndarray) -> list[int]:
    flat = np.concatenate([[0], mask.flatten(order="F"), [2]])
    return np.diff(np.flatnonzero(np.diff(flat) != 0), prepend=0).tolist()


def test_polygon_runs_and_text_are_the_same_region() -> None:
    mask = square_mask()
    text = coco.encode(np.asfortranarray(mask))["counts"]
    size = [HEIGHT, WIDTH]
    for segmentation in (
        [SQUARE],
        {"size": size, "counts": runs(mask)},
        {"size": size, "counts": text.decode()},
        {"size": size, "counts": text},
        [{"size": size, "counts": text.decode()}],
    ):
        found = referent_mask([segmentation], HEIGHT, WIDTH)
        assert np.array_equal(decode_rle(found.union), mask)
        assert found.exclusive is None and found.dropped == ()


def test_compressed_counts_of_any_mask() -> None:
    generator = np.random.default_rng(0)
    for density in (0.01, 0.3, 0.5, 0.99, 1.0):
        for grain in (1, 9):
            mask = np.kron(generator.random((70, 50)) < density, np.ones((grain, grain))).astype(np.uint8)
            if mask.any():
                rle = coco.encode(np.asfortranarray(mask))
                text = {"size": list(mask.shape), "counts": rle["counts"].decode()}
                assert referent_mask([text], *mask.shape).union["counts"] == rle["counts"].decode()
                for decoded in (decode_rle(text), decode_mask(text), decode_mask(text | {"counts": runs(mask)})):
                    assert np.array_equal(decoded, coco.decode(rle)) and decoded.dtype == np.uint8


def test_parts_are_joined_and_pixels_of_two_parts_told_apart() -> None:
    for segmentations in ([[SQUARE, OTHER]], [[SQUARE], [OTHER]]):
        found = referent_mask(segmentations, HEIGHT, WIDTH)
        union, exclusive = decode_rle(found.union), decode_rle(found.exclusive)
        assert union.sum() == 400 + 150 - 50 and exclusive.sum() == 400 + 150 - 100
        assert not exclusive[10:20, 20:25].any()


def test_no_segmentation_is_an_empty_mask() -> None:
    assert not decode_rle(referent_mask([], HEIGHT, WIDTH).union).any()


def test_a_broken_polygon_beside_a_good_one_is_dropped_aloud() -> None:
    found = referent_mask([[[1, 2, 3, 4], SQUARE]], HEIGHT, WIDTH)
    assert np.array_equal(decode_rle(found.union), square_mask())
    (why,) = found.dropped
    assert why.startswith("a polygon has four numbers, which are two points")


@pytest.mark.parametrize(
    ("segmentation", "why"),
    [
        ([[5, 5, 25, 5]], "four numbers, which are two points"),
        ([[5, 5]], "fewer than 3 points"),
        ([[5, 5, 25, 5, 25, 25, 5]], "odd number"),
        ([[5, 5, 25, 5, 25, float("nan")]], "no finite number"),
        ([[5, 5, 25, 5, 25, "x"]], "not a number"),
        ([["5", "5", "25", "5", "25", "25"]], "not a number"),
        ([[5, 5, 25, 5, 1e9, 25]], "far outside"),
        ([[5, 5, 25, 5, 10**400, 25]], "far outside"),
        ([{"size": [HEIGHT, WIDTH], "counts": [0, HEIGHT * WIDTH]}, SQUARE], "mixes"),
        ({"size": None, "counts": [9]}, "for size None"),
        ([[50, 5, 60, 5, 60, 25]], "covers no pixel"),
        ([], "no polygon"),
        (None, "no polygon"),
        ({"size": [3, 3], "counts": [9]}, "for size"),
        ({"size": [HEIGHT, WIDTH]}, "no counts"),
        ({"size": [HEIGHT, WIDTH], "counts": [5, 5]}, "do not add up"),
        ({"size": [HEIGHT, WIDTH], "counts": [HEIGHT * WIDTH + 5, -5]}, "do not add up"),
        ({"size": [HEIGHT, WIDTH], "counts": "1000000"}, "do not add up"),
        ({"size": [HEIGHT, WIDTH], "counts": "abc"}, "in the middle"),
        ({"size": [HEIGHT, WIDTH], "counts": "ÿÿ"}, "a character"),
    ],
)
def test_what_is_broken_is_said(segmentation: Any, why: str) -> None:
    with pytest.raises(BrokenSegmentationError, match=why):
        referent_mask([segmentation], HEIGHT, WIDTH)
