"""Augmentations as official codes have them, for their recipes; the project's own are in `augmentations`.

    zoom            smaller, or larger and cut around the referent: C3VG's LargeScaleJitter
    other_sentence  a sentence of any picture and an empty mask: DeRIS's conversion of referents into "no target"

Written from the recorded cases of both codes. Each is a function of (seed, epoch, sample): see `augment`.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from math import sqrt
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from amltrain.data.augment import (
    OTHER,
    Augmentation,
    Corners,
    RawDataset,
    RawSample,
    check_range,
    check_share,
    random_generator,
    register_augmentation,
)

if TYPE_CHECKING:
    from amltrain.records import Draw

ROUNDS, TRIES = (0.9, 0.8, 0.7, 0.6, 0.5), 100
"""The shares of the referent's box that must stay in the frame, one after the other, and the places tried for each."""
LEAST = 0.3
"""With less of the box than this at the best of all places, the sample stays as it is."""
ATTEMPTS = 51


@dataclass
class ZoomOptions:
    """C3VG's LargeScaleJitter: the picture shrunk, or enlarged and cut to its old size around the referent."""

    smallest: float = 0.3
    """Smallest longest side, as a share of the network's input. A picture that is stretched to it afterwards is only
    blurred by this."""
    largest: float = 1.4
    """Largest longest side, as a share of the network's input; above 1 the picture is cut to that side."""
    as_released: bool = False
    """Keep two mistakes of the official code: a place beside the referent on both axes counts as one that shows it, and
    where no place was good, the box is moved by the last place tried and the picture by the best."""

    def check(self) -> None:
        """Raise UserError for a value out of range."""
        check_range("zoom.smallest and largest", self.smallest, self.largest, 0.05, 10)


class Place(NamedTuple):
    """A frame's upper left corner in the enlarged picture, and that of the box where it is another one; pixels."""

    left: float
    top: float
    box_left: float
    box_top: float


class Zoom:
    """The augmentation. A sample without a target is cut anywhere."""

    def __init__(self, options: ZoomOptions) -> None:
        """Raises UserError for options out of range."""
        options.check()
        self.options = options

    def __call__(self, sample: RawSample, draw: "Draw", dataset: RawDataset) -> RawSample:
        rng = random_generator("zoom", dataset.seed, draw)
        return self.zoomed(sample, rng.random, dataset.input_size)

    def zoomed(self, sample: RawSample, uniform: Callable[[], float], side: int) -> RawSample:
        """The sample at a size of its own. uniform: gives numbers in 0..1; side: of the network's input, pixels."""
        from amltrain.frames import longest_side  # imports torch

        options, (height, width) = self.options, sample.mask.shape
        factor = options.smallest + (options.largest - options.smallest) * uniform()
        sides = longest_side(height, width, factor * side)
        sides = (max(1, sides[0]), max(1, sides[1]))
        frame = sides if factor <= 1 else longest_side(height, width, side)
        place = Place(0, 0, 0, 0)
        if factor > 1:
            scale = (sides[1] / width, sides[0] / height) * 2
            corners = sample.corners or _around(sample.mask)
            box = None if corners is None else tuple(c * s for c, s in zip(corners, scale, strict=True))
            found = self._find(box, sides, frame, uniform)
            if found is None:
                return sample
            place = found
        top, left = int(place.top), int(place.left)
        cut = np.s_[top : top + frame[0], left : left + frame[1]]
        image = _resized_image(sample.image, sides)[cut]

        def moved(x: float, y: float) -> tuple[float, float]:
            return x * sides[1] / width - place.box_left, y * sides[0] / height - place.box_top

        return sample.moved(Image.fromarray(image), lambda pixels: resized_mask(pixels, sides)[cut], moved)

    def _find(
        self,
        box: tuple[float, ...] | None,
        sides: tuple[int, int],
        frame: tuple[int, int],
        uniform: Callable[[], float],
    ) -> Place | None:
        """The first place that shows enough of the box, or the best one; None where it shows hardly any of it."""
        best, chosen, left, top = -1.0, None, 0.0, 0.0
        for least in ROUNDS:
            for _ in range(TRIES):
                left, top = uniform() * (sides[1] - frame[1]), uniform() * (sides[0] - frame[0])
                share = 1.0 if box is None else self._shown(box, left, top, frame)
                if share > best:
                    best, chosen = share, (left, top)
                if share >= least:
                    return Place(left, top, left, top)
        if best < LEAST or chosen is None:
            return None
        return Place(*chosen, *((left, top) if self.options.as_released else chosen))

    def _shown(self, box: tuple[float, ...], left: float, top: float, frame: tuple[int, int]) -> float:
        """The share of the box inside a frame."""
        wide = min(box[2], left + frame[1]) - max(box[0], left)
        high = min(box[3], top + frame[0]) - max(box[1], top)
        if not self.options.as_released:
            wide, high = max(wide, 0.0), max(high, 0.0)
        return wide * high / max((box[2] - box[0]) * (box[3] - box[1]), 1e-9)


def _around(mask: NDArray[np.uint8]) -> Corners | None:
    """The box around a mask [h, w]; None where it is empty."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if not rows.size:
        return None
    return (float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1))


def _resized_image(image: Image.Image, sides: tuple[int, int]) -> NDArray[np.uint8]:
    """An image at another size (rows, columns), [h, w, 3] uint8, bilinear without antialiasing."""
    from amltrain.data.transforms import stretched  # imports torch

    return np.ascontiguousarray(stretched(image, sides, "bilinear").permute(1, 2, 0).numpy())


UNITS = 2048
"""OpenCV's bilinear weights are whole numbers of 11 bits."""


def resized_mask(mask: NDArray[np.uint8], sides: tuple[int, int]) -> NDArray[np.uint8]:
    """A map of small whole numbers [h, w] uint8 at another size (rows, columns), as OpenCV's `resize` makes it.

    Its arithmetic is of whole numbers that are cut, so that a mask loses a little at its rim. A map of several values
    is made of one mask for each.
    """
    resized = np.zeros(sides, np.uint8)
    along_y, along_x = (_weights(count, side) for count, side in zip(mask.shape, sides, strict=True))
    for least in range(1, int(mask.max(initial=0)) + 1):
        covered = (mask >= least).astype(np.int32)
        left, right = (covered[:, place] * weight for place, weight in along_x)
        across = (left + right) >> 4  # [h, columns]
        above, below = ((across[place] * weight[:, None]) >> 16 for place, weight in along_y)
        resized += ((above + below + 2) >> 2).astype(np.uint8)
    return resized


def _weights(count: int, side: int) -> list[tuple[NDArray[np.int64], NDArray[np.int32]]]:
    """The two of `count` pixels that each of `side` pixels reads, [side] each, and their weights in 1/UNITS."""
    position = (np.arange(side) + 0.5) * (count / side) - 0.5
    first = np.floor(position).astype(np.int64)
    share = np.where((first < 0) | (first >= count - 1), 0.0, position - first)
    first = first.clip(0, count - 1)
    second = np.rint(share * UNITS).astype(np.int32)
    return [(first, np.rint((1 - share) * UNITS).astype(np.int32)), (np.minimum(first + 1, count - 1), second)]


@register_augmentation(options=ZoomOptions)
def zoom(options: ZoomOptions) -> Augmentation:
    """Build C3VG's jitter of sizes. Raises UserError."""
    return Zoom(options)


@dataclass
class OtherSentenceOptions:
    """DeRIS's conversion: a sentence of a picture drawn at random, for which nothing is to be found."""

    rate: float = 0.15
    """Share of samples with a target that are converted."""
    similarity: float = 0.6
    """Sentences at least this alike, letter by letter, are not taken: the mean of the Jaccard index and the cosine of
    their letters' counts."""
    same_picture: bool = False
    """Take sentences of the sample's own picture too, as the released code does by mistake: some are then true."""

    def check(self) -> None:
        """Raise UserError for a value out of range."""
        check_share("other_sentence.rate", self.rate)
        check_share("other_sentence.similarity", self.similarity)


class OtherSentence:
    """The augmentation. Where no sentence is good, the sample stays as it is.

    The official code converts its records for good where workers live on, so that ever more of them are; this does not.
    `negatives` is the safer one: it compares classes and words.
    """

    makes_no_target = True

    def __init__(self, options: OtherSentenceOptions) -> None:
        """Raises UserError for options out of range."""
        options.check()
        self.options = options

    def __call__(self, sample: RawSample, draw: "Draw", dataset: RawDataset) -> RawSample:
        rng = random_generator("other_sentence", dataset.seed, draw)
        images, first = dataset.first_referents(sample.ids.dataset)

        def sentences(image: int) -> list[str]:
            known = not self.options.same_picture and images[image] == sample.ids.image_id
            return [] if known else dataset.picture_sentences(int(first[image]))

        return self.converted(sample, rng.random, lambda count: int(rng.integers(count)), len(images), sentences)

    def converted(
        self,
        sample: RawSample,
        uniform: Callable[[], float],
        choice: Callable[[int], int],
        images: int,
        sentences: Callable[[int], list[str]],
    ) -> RawSample:
        """The sample, or one without a target. choice: gives a number below its argument; sentences: of an image."""
        if sample.no_target or uniform() > self.options.rate:
            return sample
        for _ in range(ATTEMPTS):
            offered = sentences(choice(images))
            if not offered:
                continue
            sentence = offered[choice(len(offered))]
            if sentence.split(" ") and likeness(sentence, sample.sentence) < self.options.similarity:
                regions = None if sample.regions is None else np.minimum(sample.regions, np.uint8(OTHER))
                mask = np.zeros_like(sample.mask)
                return sample._replace(sentence=sentence, mask=mask, no_target=True, regions=regions)
        return sample


def likeness(one: str, other: str) -> float:
    """How alike two texts are, 0..1: the mean of Jaccard index and cosine of the counts of their characters."""
    if one == other or not one or not other:
        return float(one == other)
    both, either = Counter(one) & Counter(other), Counter(one) | Counter(other)
    return (both.total() / either.total() + both.total() / sqrt(len(one) * len(other))) / 2


@register_augmentation(options=OtherSentenceOptions)
def other_sentence(options: OtherSentenceOptions) -> Augmentation:
    """Build DeRIS's conversion into "no target". Raises UserError."""
    return OtherSentence(options)
