"""Augmentations: functions between a raw sample and the transform, and their registry.

    row -> RawSample -> augmentations, in the order of `data.augment` -> transform and tokenizer -> Sample

An augmentation is a function of (seed, epoch, sample) alone, so a resumed or differently spread run draws the same
samples. `random_generator` is its only source of random numbers. Off by default; evaluation never augments.

    @register_augmentation(options=MosaicOptions)
    def mosaic(options: MosaicOptions) -> Augmentation: ...

The function's name is the augmentation's name; the options dataclass is the section of that name in a run's config.
This file and the files of augmentations do not import torch, so that a command line can list options quickly.
"""

import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from amltrain.errors import UserError
from amltrain.registry import AUGMENTATIONS

if TYPE_CHECKING:
    from amltrain.records import Draw


class SampleIds(NamedTuple):
    """Where a sample comes from. ref_id and sent_id are unique within one data set only."""

    dataset: str
    split: str
    image_id: int
    ref_id: int
    sent_id: int


Corners = tuple[float, float, float, float]
"""A box x1, y1, x2, y2 in pixels of an image, continuous: a pixel's box is one pixel wide."""


class RawObjects(NamedTuple):
    """What is annotated of a mask besides, and the very mask that it belongs to: another array has neither.

    corners    the box; None without one
    instances  masks [h, w] of the objects one by one, where there are several; () = it is one
    """

    mask: NDArray[np.uint8]
    corners: Corners | None = None
    instances: tuple[NDArray[np.uint8], ...] = ()


BACKGROUND, OTHER, REFERENT = 0, 1, 2
"""What a pixel of `RawSample.regions` shows: no referent of the picture, another one, the sample's own."""


class RawSample(NamedTuple):
    """A sample before transform and tokenizer.

    image     RGB, h x w pixels
    mask      [h, w] uint8, 1 where the referent is, else 0; all 0 for a sentence without target
    sentence  the text that the tokenizer will read
    ids       where the sample comes from; an augmentation keeps them
    no_target the sentence means nothing in the image; the mask is then all 0
    regions   [h, w] uint8, BACKGROUND, OTHER or REFERENT, as annotated; None unless the method asks for it
    objects   what is annotated of the mask besides; None unless the model asks for it. Read `corners` and `instances`
    """

    image: Image.Image
    mask: NDArray[np.uint8]
    sentence: str
    ids: SampleIds
    no_target: bool = False
    regions: NDArray[np.uint8] | None = None
    objects: RawObjects | None = None

    @property
    def corners(self) -> Corners | None:
        """The annotated box; None where there is none, or where the mask was replaced by another."""
        return self.objects.corners if self.objects is not None and self.objects.mask is self.mask else None

    @property
    def instances(self) -> tuple[NDArray[np.uint8], ...]:
        """Masks of the objects one by one; () where there is one, or where the mask was replaced by another."""
        return self.objects.instances if self.objects is not None and self.objects.mask is self.mask else ()

    def moved(
        self,
        image: Image.Image,
        move: Callable[[NDArray[np.uint8]], NDArray[np.uint8]],
        place: Callable[[float, float], tuple[float, float]] | None = None,
    ) -> "RawSample":
        """The sample with another image, and with `move` applied to every map of its pixels: [h, w] -> [h', w'].

        place: where a point (x, y) of the old image lies in the new one, pixels; without it the annotated box is lost
        and a model that asks for one gets the box around the mask.
        """
        regions, mask = None if self.regions is None else move(self.regions), move(self.mask)
        corners, objects = None, None
        if place is not None and self.corners is not None:
            x1, y1, x2, y2 = self.corners
            (u1, v1), (u2, v2) = place(x1, y1), place(x2, y2)
            corners = (min(u1, u2), min(v1, v2), max(u1, u2), max(v1, v2))
        if self.objects is not None:
            objects = RawObjects(mask, corners, tuple(map(move, self.instances)))
        return self._replace(image=image, mask=mask, regions=regions, objects=objects)


class About(NamedTuple):
    """What the annotations say of a sample's referent and of its picture.

    image_id, category, no_target, own   of the referent; own: its sentences; category: "" where it is not named
    sentences, categories                of all referents of the picture, the sample's own among them
    """

    image_id: int
    category: str
    no_target: bool
    own: list[str]
    sentences: list[str]
    categories: set[str]


class RawDataset(Protocol):
    """What an augmentation may ask of the training set.

    seed             the run's seed
    input_size       side of the network input, pixels
    referent_images  [referents] int64, the image id of every referent in training
    """

    def __len__(self) -> int: ...

    def about(self, sample_id: int) -> About:
        """The sample's referent and its picture, as annotated."""

    @property
    def seed(self) -> int: ...

    @property
    def input_size(self) -> int: ...

    @property
    def referent_images(self) -> NDArray[np.int64]: ...

    def other_masks(self, sample_id: int) -> list[NDArray[np.uint8]]:
        """Masks [h, w] uint8 of the other referents of a sample's picture."""

    def picture_sentences(self, referent: int) -> list[str]:
        """Sentences of all referents of one referent's picture."""

    def referent_picture(self, referent: int) -> Image.Image:
        """Decode the image of one referent (an index into `referent_images`), RGB."""

    def first_referents(self, dataset: str) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Image ids of one data set in training, sorted, and the first referent of each."""


class Augmentation(Protocol):
    """Maps a raw sample to a raw sample; built once per process, used by all loader workers.

    One that makes samples without a target says so by an attribute `makes_no_target = True`. One that is the same in
    every epoch may have `summary(dataset) -> str`, what it does to a training set, for the header of a run.
    """

    def __call__(self, sample: RawSample, draw: "Draw", dataset: RawDataset) -> RawSample: ...


Builder = TypeVar("Builder", bound=Callable[[Any], Augmentation])


def register_augmentation(options: type[Any]) -> Callable[[Builder], Builder]:
    """Register a function that builds an augmentation from its options; the function's name is the augmentation's.

    options: a dataclass whose fields all have defaults; the docstring under a field is its `--help`. A method
    `check()` may raise UserError for values out of range, before a run starts.
    """

    def register(build: Builder) -> Builder:
        AUGMENTATIONS.add(build.__name__, build, options=options)
        return build

    return register


def build_augmentations(names: Sequence[str], options: Mapping[str, Any] | None = None) -> list[Augmentation]:
    """Build augmentations in order.

    names: registered names (`data.augment`). options: by name, an instance of that augmentation's options dataclass;
    an augmentation without an entry gets its defaults.
    Raises UserError for an unknown name, a name given twice, and options that the augmentation rejects.
    """
    twice = sorted({name for name in names if list(names).count(name) > 1})
    if twice:
        raise UserError(f"data.augment names {', '.join(twice)} more than once")
    given = options or {}
    built = []
    for name in names:
        options_of_name = given[name] if name in given else AUGMENTATIONS.options(name)()
        built.append(AUGMENTATIONS[name].value(options_of_name))
    return built


def check_share(name: str, value: float) -> None:
    """Raise UserError unless an option lies between 0 and 1."""
    if not 0 <= value <= 1:
        raise UserError(f"{name} is {value} and must lie between 0 and 1")


def check_range(name: str, low: float, high: float, least: float, most: float) -> None:
    """Raise UserError unless two options rise and lie in a range."""
    if not least <= low <= high <= most:
        raise UserError(f"{name} is from {low} to {high}; it must rise and lie between {least:g} and {most:g}")


def described(names: Sequence[str], built: Sequence[Augmentation], dataset: RawDataset) -> str:
    """The augmentations of a run in words: each with the options that differ from their defaults, and its summary."""
    said = []
    for name, augmentation in zip(names, built, strict=True):
        options, usual = getattr(augmentation, "options", None), AUGMENTATIONS.options(name)()
        values = {} if options is None else vars(options)
        changed = [f"{key} {value}" for key, value in values.items() if value != getattr(usual, key, value)]
        if hasattr(augmentation, "summary"):
            changed.append(augmentation.summary(dataset))
        said.append(f"{name} ({', '.join(changed)})" if changed else name)
    return ", ".join(said)


def random_generator(name: str, seed: int, draw: "Draw") -> np.random.Generator:
    """Random numbers of one augmentation for one draw: a function of name, seed, epoch, sample and repeat."""
    from amltrain.randomness import random_key  # imports torch

    key = random_key(seed, draw.epoch, draw.index, draw.repeat, zlib.crc32(name.encode()))
    return np.random.default_rng(key % (1 << 64))
