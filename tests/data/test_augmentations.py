"""Augmentations that keep sentence and mask true to each other."""

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from amltrain.data.augment import BACKGROUND, OTHER, REFERENT, About, RawSample, SampleIds, build_augmentations
from amltrain.data.augmentations import (
    LabelNoise,
    LabelNoiseOptions,
    Negatives,
    NegativesOptions,
    content_words,
    mirrored,
    names_a_colour,
)
from amltrain.errors import UserError
from amltrain.records import Draw
from amltrain.registry import AUGMENTATIONS
from tests.data.stand_in import shapes_dataset

NAMES = ["negatives", "flip", "scale_jitter", "resize_crop", "colour_jitter", "label_noise"]
HEIGHT, WIDTH = 40, 60


def build(name: str, **options: Any) -> Any:
    (built,) = build_augmentations([name], {name: AUGMENTATIONS.options(name)(**options)})
    return built


class Data:
    """Stands for a training set of pictures 0, 1, 2 with one referent each."""

    seed = 0

    def __init__(self, *about: About) -> None:
        self._about = about

    def __len__(self) -> int:
        return len(self._about)

    def about(self, sample_id: int) -> About:
        return self._about[sample_id]


def sample(sentence: str = "the left dog", box: tuple[int, int, int, int] = (5, 10, 20, 30)) -> RawSample:
    """A picture whose every pixel tells where it was: red = column, green = row."""
    columns, rows = np.meshgrid(np.arange(WIDTH), np.arange(HEIGHT))
    pixels = np.stack([columns * 4, rows * 6, np.full_like(rows, 9)], 2).astype(np.uint8)
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    mask[box[1] : box[3], box[0] : box[2]] = 1
    return RawSample(Image.fromarray(pixels), mask, sentence, SampleIds("x", "train", 1, 2, 3))


def about(image: int, category: str, *sentences: str, others: tuple[str, ...] = (), no_target: bool = False) -> About:
    return About(image, category, no_target, list(sentences), [*sentences, *others], {category})


def draws(count: int = 200) -> list[Draw]:
    return [Draw(epoch, 0) for epoch in range(count)]


@pytest.mark.parametrize("name", NAMES)
def test_all_are_registered_and_functions_of_the_draw(name: str, prepared: str) -> None:
    options = {"negatives": {"rate": 1.0}, "label_noise": {"share": 1.0}}.get(name, {"probability": 1.0})
    one, two = (shapes_dataset(prepared, augmentations=[build(name, **options)]) for _ in range(2))
    changed = 0
    for index in range(12):
        first, again = one[Draw(1, index)], two[Draw(1, index)]
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True) if isinstance(a, torch.Tensor))
        plain = shapes_dataset(prepared)[Draw(1, index)]
        assert torch.equal(first.random_key, plain.random_key) and first.image.shape == plain.image.shape
        same = torch.equal(first.image, plain.image) and torch.equal(first.target, plain.target)
        changed += not same or bool(first.no_target != plain.no_target)
    assert changed or name in ("negatives", "colour_jitter")  # every sentence of RefShapes names a colour


def test_a_negative_has_another_sentence_no_mask_and_no_target() -> None:
    data = Data(about(1, "dog", "the left dog"), about(2, "cat", "a black cat"))
    found = [build("negatives", rate=1.0)(sample(), draw, data) for draw in draws(20)]
    changed = [entry for entry in found if entry.no_target]
    assert changed and all(entry.sentence == "a black cat" and not entry.mask.any() for entry in changed)
    assert all(entry.image is changed[0].image or entry.image.size == (WIDTH, HEIGHT) for entry in changed)


@pytest.mark.parametrize(
    "other",
    [
        about(1, "cat", "a black cat"),  # the same picture
        about(2, "dog", "a black animal"),  # the same class
        about(2, "cat", "two dogs"),  # the same word
        about(2, "cat", "the man"),  # a word of another referent of this picture
        about(2, "cat", "a black cat", no_target=True),
    ],
)
def test_a_sentence_that_could_fit_is_not_taken(other: About) -> None:
    data = Data(about(1, "dog", "the left dog", others=("a man with a hat",)), other)
    assert not any(build("negatives", rate=1.0)(sample(), draw, data).no_target for draw in draws(30))


def test_the_rate_is_that_of_the_options() -> None:
    data = Data(about(1, "dog", "the left dog"), *(about(n, "cat", "a black cat") for n in range(2, 40)))
    share = np.mean([build("negatives", rate=0.3)(sample(), draw, data).no_target for draw in draws(400)])
    assert 0.22 < share < 0.38


def test_no_target_of_a_batch_comes_from_the_augmented_sample(prepared: str) -> None:
    def empty(given: RawSample, draw: Draw, dataset: object) -> RawSample:
        return given._replace(mask=np.zeros_like(given.mask), no_target=True)

    assert not bool(shapes_dataset(prepared)[0].no_target)
    found = shapes_dataset(prepared, augmentations=[empty])[0]
    assert bool(found.no_target) and not found.target.any()


@pytest.mark.parametrize(
    ("sentence", "expected"),
    [
        ("the left dog", "the right dog"),
        ("Right person", "Left person"),
        ("LEFT", "RIGHT"),
        ("dog to the left of the man on the right", "dog to the right of the man on the left"),
        ("the leftmost cup", "the rightmost cup"),
        ("right-hand side", "left-hand side"),
        ("lefthand man", "righthand man"),
        ("the brightly lit copyright sign", "the brightly lit copyright sign"),
        ("the dog", "the dog"),
        ("second dog", "second dog"),
        ("second dog from the left", None),
        ("3rd from right", None),
        ("the man right behind her", None),
        ("at 3 o'clock", None),
        ("the western wall", None),
    ],
)
def test_words_of_sides_are_exchanged(sentence: str, expected: str | None) -> None:
    assert mirrored(sentence) == expected
    if expected is not None:
        assert mirrored(expected) == sentence


def test_a_flip_mirrors_picture_mask_and_words() -> None:
    given = sample()
    found = build("flip", probability=1.0)(given, Draw(0, 0), Data())
    assert found.sentence == "the right dog"
    assert np.array_equal(found.mask, given.mask[:, ::-1])
    assert np.array_equal(np.asarray(found.image), np.asarray(given.image)[:, ::-1])
    same = build("flip", probability=1.0)(given._replace(sentence="first dog on the left"), Draw(0, 0), Data())
    assert np.array_equal(same.mask, given.mask) and same.sentence == "first dog on the left"


def test_a_crop_keeps_the_referent() -> None:
    given = sample(box=(30, 5, 50, 35))
    sizes = set()
    for draw in draws():
        found = build("resize_crop", probability=1.0, smallest=0.3)(given, draw, Data())
        assert found.mask.sum() == given.mask.sum() and found.mask.shape == found.image.size[::-1]
        rows, columns = np.nonzero(found.mask)
        pixels = np.asarray(found.image)[rows, columns]  # the pixels under the mask are those of the referent
        assert pixels[:, 0].min() == 30 * 4 and pixels[:, 1].max() == 34 * 6
        sizes.add(found.mask.shape)
    assert len(sizes) > 50
    empty = given._replace(mask=np.zeros_like(given.mask), no_target=True)
    assert build("resize_crop", probability=1.0)(empty, Draw(0, 0), Data()).no_target


def test_a_scaled_picture_keeps_its_frame_and_most_of_the_referent() -> None:
    given = sample()
    areas = []
    for draw in draws():
        found = build("scale_jitter", keep=0.7)(given, draw, Data())
        assert found.mask.shape == (HEIGHT, WIDTH) and found.image.size == (WIDTH, HEIGHT)
        assert set(np.unique(found.mask)) <= {0, 1} and found.mask.any()
        areas.append(found.mask.sum() / given.mask.sum())
    assert min(areas) < 0.5 and max(areas) > 2
    small = build("scale_jitter", smallest=0.5, largest=0.5)(given, Draw(0, 0), Data())
    rows, columns = np.nonzero(small.mask)
    pixels = np.asarray(small.image)[rows, columns].astype(int)
    assert abs(pixels[:, 0].mean() - 4 * 12) < 6 and abs(pixels[:, 1].mean() - 6 * 19.5) < 8


def test_colours_change_but_not_where_a_sentence_names_one() -> None:
    given = sample("the left dog")
    found = build("colour_jitter", probability=1.0)(given, Draw(0, 0), Data())
    assert not np.array_equal(np.asarray(found.image), np.asarray(given.image)) and found.mask is given.mask
    for sentence in ("the red car", "man in dark jacket", "BLUE"):
        assert names_a_colour(sentence)
        spared = build("colour_jitter", probability=1.0)(given._replace(sentence=sentence), Draw(0, 0), Data())
        assert spared.image is given.image
    assert not names_a_colour("a hundred tanned bluebirds")


def test_words_that_say_what_is_meant() -> None:
    assert content_words("The two Dogs on the left of a man's hat") == {"two", "dog", "man", "hat"}


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("negatives", {"rate": 1.2}, "negatives.rate is 1.2"),
        ("flip", {"probability": -1}, "flip.probability is -1"),
        ("scale_jitter", {"smallest": 3.0}, "it must rise"),
        ("scale_jitter", {"keep": 2}, "scale_jitter.keep is 2"),
        ("resize_crop", {"smallest": 0.0}, "resize_crop.smallest is from 0.0"),
        ("colour_jitter", {"hue": 0.7}, "colour_jitter.hue is from 0.7"),
    ],
)
def test_options_out_of_range_are_rejected(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        build(name, **options)


def test_maps_of_the_truth_move_with_the_mask(prepared: str) -> None:
    """Regions stay what the mask says, through every augmentation that moves pixels, and know the other referents."""
    for names in ("flip", "scale_jitter", "resize_crop", "mosaic"):
        augmentations = build_augmentations([names], {names: AUGMENTATIONS.options(names)(probability=1.0)})
        dataset = shapes_dataset(prepared, augmentations=augmentations, regions=True)
        moved = 0
        for index in range(20):
            raw = dataset.raw(index)
            changed = augmentations[0](raw, Draw(0, index), dataset)
            assert np.array_equal(changed.regions == REFERENT, changed.mask == 1), names
            moved += not np.array_equal(changed.mask, raw.mask)
            sample = dataset[Draw(0, index)]
            assert torch.equal(sample.regions == REFERENT, sample.target >= 128)
        assert moved, names


def test_regions_are_the_pictures_referents(prepared: str) -> None:
    dataset = shapes_dataset(prepared, regions=True)
    seen = 0
    for index in range(20):
        raw, others = dataset.raw(index), dataset.other_masks(index)
        expected = np.zeros_like(raw.mask)
        for mask in others:
            assert mask.shape == raw.mask.shape and not np.array_equal(mask, raw.mask)
            expected[mask == 1] = OTHER
        expected[raw.mask == 1] = REFERENT
        assert np.array_equal(raw.regions, expected)
        seen += len(others)
    assert seen
    assert shapes_dataset(prepared)[0].regions is None


def test_negatives_mean_nothing_in_the_regions_either() -> None:
    data = Data(about(1, "dog", "the left dog"), about(2, "car", "a red car"))
    given = sample()._replace(regions=np.where(sample().mask == 1, REFERENT, BACKGROUND).astype(np.uint8))
    changed = Negatives(NegativesOptions(rate=1.0))(given, Draw(0, 0), data)
    assert changed.no_target and changed.regions.max() == OTHER and (changed.regions == OTHER).sum() == given.mask.sum()


@pytest.mark.parametrize("kind", ["swap", "shift"])
def test_label_noise_is_wrong_for_its_share_in_every_epoch_and_leaves_the_truth(prepared: str, kind: str) -> None:
    noise = LabelNoise(LabelNoiseOptions(share=0.35, kind=kind))
    dataset = shapes_dataset(prepared, regions=True, augmentations=[noise])
    wrong = []
    for index in range(len(dataset)):
        raw = dataset.raw(index)
        changed = [noise(raw, Draw(epoch, index), dataset) for epoch in range(3)]
        assert all(np.array_equal(changed[0].mask, other.mask) for other in changed)
        assert np.array_equal(changed[0].regions == REFERENT, raw.mask == 1)
        wrong.append(not np.array_equal(changed[0].mask, raw.mask))
        assert changed[0].mask.any() and wrong[-1] == noise.is_wrong(dataset.seed, index)
        if wrong[-1] and kind == "swap" and (others := dataset.other_masks(index)):
            assert any(np.array_equal(changed[0].mask, other) for other in others)
    assert abs(np.mean(wrong) - 0.35) < 4 * (0.35 * 0.65 / len(wrong)) ** 0.5
    empty = sample()._replace(mask=np.zeros_like(sample().mask), no_target=True)
    assert all(not noise(empty, Draw(0, i), dataset).mask.any() for i in range(20))
