"""Augmentations and resizes of C3VG and DeRIS against what their official code recorded."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from amltrain.data.augment import RawObjects, RawSample, SampleIds, build_augmentations
from amltrain.data.official_augmentations import (
    OtherSentence,
    OtherSentenceOptions,
    Zoom,
    ZoomOptions,
    likeness,
    resized_mask,
)
from amltrain.data.transforms import ImageTransform, View, normalise
from amltrain.errors import UserError
from amltrain.records import Draw
from tests.data.stand_in import shapes_dataset

CASES = ["shrink", "nearly_one", "crop_first_try", "crop_third_try", "best_of_500", "given_up"]


@pytest.fixture(scope="module")
def recorded(shared_dir: Path) -> dict[str, Any]:
    folder = shared_dir / "goldens" / "c3vg"
    return {
        "cases": json.loads((folder / "data_pipeline.json").read_text())["cases"],
        **load_file(folder / "data_pipeline.safetensors"),
    }


def replay(case: dict[str, Any]) -> Callable[[], float]:
    """The random numbers of a recorded case, one after the other."""
    given: Iterator[float] = iter(case["randoms"])
    return lambda: next(given, case["afterwards_always"])


def picture(recorded: dict[str, Any], case: str) -> RawSample:
    kind = "corner_" if case in ("best_of_500", "given_up") else ""
    mask = recorded[f"input.{kind}mask"].numpy()
    objects = RawObjects(mask, tuple(recorded[f"input.{kind}box"].tolist()))
    image = Image.fromarray(recorded["input.image_rgb"].numpy())
    return RawSample(image, mask, "it", SampleIds("x", "train", 1, 2, 3), objects=objects)


@pytest.mark.parametrize("case", CASES)
def test_the_jitter_of_sizes_is_c3vgs(case: str, recorded: dict[str, Any]) -> None:
    """The same masks and boxes, images within two grey levels, from the same random numbers."""
    zoomed = Zoom(ZoomOptions(as_released=True)).zoomed(picture(recorded, case), replay(recorded["cases"][case]), 64)
    height, width = zoomed.mask.shape
    np.testing.assert_array_equal(zoomed.mask, recorded[f"{case}.jittered_mask"].numpy())
    difference = np.abs(np.asarray(zoomed.image, int) - recorded[f"{case}.jittered_image_rgb"].numpy())
    assert difference.max() <= 2
    last = np.array([width - 1, height - 1] * 2)  # its boxes end at the last pixel's index, ours at its border
    assert zoomed.corners is not None
    expected = recorded[f"{case}.jittered_box"].numpy()
    np.testing.assert_allclose(np.clip(zoomed.corners, 0, last), expected, rtol=0, atol=1e-4)


def test_without_its_mistakes_the_box_moves_with_the_picture(recorded: dict[str, Any]) -> None:
    case = recorded["cases"]["best_of_500"]
    for as_released in (False, True):
        given = picture(recorded, "best_of_500")
        zoomed = Zoom(ZoomOptions(as_released=as_released)).zoomed(given, replay(case), 64)
        columns, rows = np.flatnonzero(zoomed.mask.any(0)), np.flatnonzero(zoomed.mask.any(1))
        assert zoomed.corners is not None
        right, bottom = zoomed.corners[2:]
        together = abs(right - columns[-1] - 1) < 1.5 and abs(bottom - rows[-1] - 1) < 1.5
        assert together is not as_released


@pytest.mark.parametrize("case", ["evaluation", *CASES])
def test_the_network_input_is_c3vgs(case: str, recorded: dict[str, Any]) -> None:
    """Masks equal; images within two grey levels of its arithmetic of whole numbers."""
    if case == "evaluation":
        image, mask = recorded["input.image_rgb"], recorded["input.mask"]
    else:
        image, mask = recorded[f"{case}.jittered_image_rgb"], recorded[f"{case}.jittered_mask"]
    made = ImageTransform(64, "square_aliased")(Image.fromarray(image.numpy()), mask.numpy())
    assert made.target is not None
    torch.testing.assert_close(made.target, recorded[f"{case}.mask"] * 255, rtol=0, atol=0)
    found, expected = normalise(made.image, "imagenet"), recorded[f"{case}.image"]
    assert (found - expected).abs().max() < 2.1 / 255 / 0.224


def test_both_pictures_are_deris(shared_dir: Path) -> None:
    recorded = load_file(shared_dir / "goldens" / "deris" / "preprocess.safetensors")
    image = Image.fromarray(recorded["input.image_rgb"].numpy())
    target = recorded["inter.instances_original"].amax(0).numpy()
    made = ImageTransform(64, "square_aliased")(image, target)
    assert made.target is not None
    torch.testing.assert_close(made.target, recorded["output.target"] * 255, rtol=0, atol=0)
    small, geometry = View(32, "bilinear")(image)
    for found, name in ((made.image, "image"), (small, "image_small")):
        expected = recorded[f"inter.{name}_uint8_rgb"].permute(2, 0, 1).int()
        assert (found.int() - expected).abs().max() <= 1, name
    assert geometry.tolist() == [37, 53, 32 / 37, 32 / 53, 0, 0]


def test_a_map_of_several_values_keeps_its_values() -> None:
    regions = np.zeros((20, 30), np.uint8)
    regions[2:10, 3:12], regions[8:18, 10:25] = 1, 2
    smaller = resized_mask(regions, (9, 14))
    assert set(np.unique(smaller)) == {0, 1, 2}
    np.testing.assert_array_equal(smaller == 2, resized_mask((regions == 2).astype(np.uint8), (9, 14)) == 1)
    np.testing.assert_array_equal(resized_mask(regions, (20, 30)), regions)


@pytest.fixture(scope="module")
def conversion(shared_dir: Path) -> dict[str, Any]:
    return json.loads((shared_dir / "goldens" / "deris" / "conversion.json").read_text())


def test_sentences_become_no_target_as_in_deris(conversion: dict[str, Any]) -> None:
    """The recorded draws lead to the recorded sentences; those of the same picture only with its mistake kept."""
    library = conversion["library"]
    converted = 0
    for case in conversion["cases"]:
        draws = iter(case["draws"])
        taken = 0
        config = case["config"]
        options = OtherSentenceOptions(config["rate"], config["simlarity_threshold"], same_picture=True)
        mask = np.ones((4, 4), np.uint8)
        ids = SampleIds("x", "train", case["image_id"], 2, 3)
        sample = RawSample(Image.new("RGB", (4, 4)), mask, case["sentence"], ids, case["no_target_before"])

        def uniform(draws: Iterator[list[Any]] = draws) -> float:
            return float(next(draws)[1])

        def choice(count: int, draws: Iterator[list[Any]] = draws) -> int:
            nonlocal taken
            taken += 1
            if len(case["draws"]) < case["n_draws"] and taken >= len(case["draws"]):  # noqa: B023
                return 0  # of the one that gives up only the first draws were kept; it refuses every sentence
            kind, expected, index = next(draws)
            assert (kind, count) == ("choice", expected)
            return int(index)

        found = OtherSentence(options).converted(
            sample, uniform, choice, len(library), lambda index: library[list(library)[index]]
        )
        assert next(draws, None) is None
        assert case["n_draws"] == taken + (not case["no_target_before"])
        if case["converted"]:
            assert (found.sentence, found.no_target, int(found.mask.sum())) == (case["sentence_after"], True, 0)
            converted += 1
        else:
            assert found is sample
    assert converted == 15


def test_likeness_is_the_official_one(conversion: dict[str, Any]) -> None:
    for pair in conversion["similarity"]:
        assert likeness(pair["a"], pair["b"]) == pytest.approx(pair["mean"], abs=1e-12)


@pytest.mark.parametrize("name", ["zoom", "other_sentence"])
def test_both_are_functions_of_the_draw(name: str, prepared: str) -> None:
    options = {"other_sentence": OtherSentenceOptions(rate=1.0)}
    one, two = (shapes_dataset(prepared, augmentations=build_augmentations([name], options)) for _ in range(2))
    changed = 0
    for index in range(12):
        first, again = one[Draw(1, index)], two[Draw(1, index)]
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True) if isinstance(a, torch.Tensor))
        plain = shapes_dataset(prepared)[Draw(1, index)]
        changed += not torch.equal(first.image, plain.image) or bool(first.no_target) is not bool(plain.no_target)
        if name == "other_sentence" and bool(first.no_target):
            assert first.sentence not in one.about(index).sentences and not first.target.any()
    assert changed >= 6


def test_a_sample_without_a_target_is_zoomed_too(prepared: str) -> None:
    image = Image.new("RGB", (40, 30), "red")
    sample = RawSample(image, np.zeros((30, 40), np.uint8), "it", SampleIds("x", "train", 1, 2, 3), True)
    numbers = iter([0.99, 0.5, 0.5])
    zoomed = Zoom(ZoomOptions()).zoomed(sample, lambda: next(numbers), 64)
    assert zoomed.image.size == (64, 48) and zoomed.mask.shape == (48, 64) and zoomed.no_target


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (ZoomOptions(smallest=2.0), "zoom.smallest and largest is from 2.0 to 1.4"),
        (OtherSentenceOptions(rate=1.5), "other_sentence.rate is 1.5"),
        (OtherSentenceOptions(similarity=-1), "other_sentence.similarity is -1"),
    ],
)
def test_options_out_of_range(options: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        options.check()
