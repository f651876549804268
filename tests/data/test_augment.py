"""Augmentations: registered by name, between the raw sample and the transform, functions of (seed, epoch, sample)."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from amltrain.data.augment import (
    RawSample,
    build_augmentations,
    described,
    random_generator,
    register_augmentation,
)
from amltrain.data.augmentations import LabelNoiseOptions
from amltrain.errors import UserError
from amltrain.records import Draw
from amltrain.registry import AUGMENTATIONS
from tests.data.stand_in import shapes_dataset


def test_unknown_names_list_close_matches() -> None:
    with pytest.raises(UserError, match=r"unknown augmentation 'mosiac'; did you mean mosaic\?"):
        build_augmentations(["mosiac"])
    with pytest.raises(UserError, match="names mosaic more than once"):
        build_augmentations(["mosaic", "mosaic"])


def test_a_name_is_registered_once() -> None:
    assert "mosaic" in AUGMENTATIONS.names()
    with pytest.raises(UserError, match="registered already"):

        @register_augmentation(options=dict)
        def mosaic(options: dict) -> None: ...


def test_options_are_built_with_their_defaults_or_as_given() -> None:
    (default,), (given,) = (
        build_augmentations(["mosaic"], options)
        for options in (None, {"mosaic": AUGMENTATIONS.options("mosaic")(probability=0.1)})
    )
    assert (default.options.probability, given.options.probability) == (0.5, 0.1)


def test_the_registry_does_not_import_torch() -> None:
    code = "import sys, amltrain.data.augment as a; assert a.AUGMENTATIONS.entries(); assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_random_numbers_are_a_function_of_seed_epoch_sample_and_name() -> None:
    draws = [Draw(0, 0), Draw(1, 0), Draw(0, 1), Draw(0, 0, 1)]
    cases = [("a", 0, draw) for draw in draws] + [("b", 0, draws[0]), ("a", 1, draws[0])]
    numbers = [random_generator(*case).random() for case in cases]
    assert len(set(numbers)) == len(cases)
    assert numbers == [random_generator(*case).random() for case in cases]


def test_an_augmentation_sees_the_raw_sample_and_its_result_is_trained_on(prepared: str) -> None:
    seen: list[RawSample] = []

    def paint(sample: RawSample, draw: Draw, dataset: object) -> RawSample:
        seen.append(sample)
        red = Image.new("RGB", sample.image.size, (200 + draw.epoch, 0, 0))
        return sample._replace(image=red, mask=np.ones_like(sample.mask), sentence="red square")

    plain, painted = shapes_dataset(prepared), shapes_dataset(prepared, augmentations=[paint])
    sample = painted[Draw(3, 5)]
    assert seen[0].ids[:] == plain.info(5)[:5] and seen[0].sentence == plain.info(5).sentence
    assert seen[0].image.tobytes() == plain.picture(5).tobytes()
    assert sample.image[0].unique().tolist() == [203] and sample.target.unique().tolist() == [255]
    assert torch.equal(sample.input_ids, painted.tokenizer("red square")[0])
    assert torch.equal(sample.random_key, plain[Draw(3, 5)].random_key)


def test_a_run_says_what_its_augmentations_do(prepared: str) -> None:
    """Options that differ from their defaults; of wrong labels, how many there are: counted, not what was asked for."""
    names = ["flip", "label_noise", "mosaic"]
    options = {"label_noise": LabelNoiseOptions(share=0.5)}
    built = build_augmentations(names, options)
    dataset = shapes_dataset(prepared, augmentations=built)
    said = described(names, built, dataset)
    wrong = sum(built[1].is_wrong(dataset.seed, index) for index in range(len(dataset)))
    assert said.startswith(f"flip, label_noise (share 0.5, {wrong:,} of {len(dataset):,} samples, ")
    assert said.endswith(", mosaic") and 0.3 < wrong / len(dataset) < 0.7
