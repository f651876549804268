"""Augmentations that keep sentence and mask true to each other.

    negatives      another picture's sentence and an empty mask: the sentence means nothing here
    flip           left and right exchanged in picture, mask and words
    scale_jitter   the picture larger or smaller in a frame of its own size (large-scale jitter)
    resize_crop    a part of the picture that keeps the whole referent
    colour_jitter  brightness, contrast, saturation and hue; sentences that name a colour are spared
    label_noise    wrong masks for a share of the samples, the same in every epoch: an experiment, not a help

Each is off by default and a function of (seed, epoch, sample): see `augment`.
"""

import re
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageEnhance

from amltrain.data.augment import (
    OTHER,
    Augmentation,
    RawDataset,
    RawSample,
    check_range,
    check_share,
    random_generator,
    register_augmentation,
)
from amltrain.errors import UserError

if TYPE_CHECKING:
    from amltrain.records import Draw

TRIES = 10
"""Draws of another sentence, or of another frame, before a sample is left as it is."""
_COMMON_WORDS = """a an the of on in at to with and or is are that which who this it its his her from for by near next
behind front above below under over left right top bottom middle center centre upper lower far close closest nearest
side one first second third fourth fifth last most big small large tall short bigger smaller largest smallest"""
_COMMON = frozenset(_COMMON_WORDS.split())
"""Words that say nothing of what is meant; all others are compared when a sentence is moved to another picture."""
_COLOUR_WORDS = """red orange yellow green blue purple violet pink brown black white grey gray silver gold golden beige
tan maroon cyan magenta turquoise teal navy cream dark light bright colorful colourful colored coloured blond blonde"""
_COLOURS = frozenset(_COLOUR_WORDS.split())
_ORDINALS = re.compile(r"\b(first|second|third|fourth|fifth|sixth|seventh|eighth|ninth|tenth|last|\d+(st|nd|rd|th))\b")
_SIDE = re.compile(r"(left|right)(?=(?:most|side|hand|er|ward|wards|y)?\b)", re.IGNORECASE)
_NOT_A_SIDE = re.compile(
    r"\bright (next|behind|above|below|beside|before|after|under|over|there|here|in front|on top|up)\b|"
    r"o'?clock|\b(east|west)(ern)?\b|\bleft (over|alone|behind)\b",
    re.IGNORECASE,
)


@dataclass
class NegativesOptions:
    """Sentences of other pictures, for which nothing is to be found."""

    rate: float = 0.1
    """Share of samples that become negatives."""

    def check(self) -> None:
        """Raise UserError for a value out of range."""
        check_share("negatives.rate", self.rate)


class Negatives:
    """A share of samples get a sentence of another picture and an empty mask.

    The other picture has another image id. A sentence is not taken where its referent's class is among the classes of
    this picture's referents, or where it shares a content word with a sentence about this picture. Where ten sentences
    are no good, the sample stays as it is.
    """

    makes_no_target = True

    def __init__(self, options: NegativesOptions) -> None:
        """Raises UserError for options out of range."""
        options.check()
        self.options = options

    def __call__(self, sample: RawSample, draw: "Draw", dataset: RawDataset) -> RawSample:
        rng = random_generator("negatives", dataset.seed, draw)
        if rng.random() >= self.options.rate:
            return sample
        here = dataset.about(draw.index)
        words = set().union(*map(content_words, here.sentences))
        for _ in range(TRIES):
            other = int(rng.integers(len(dataset)))
            there = dataset.about(other)
            if there.image_id == here.image_id or there.no_target or there.category in here.categories - {""}:
                continue
            sentence = there.own[int(rng.integers(len(there.own)))]
            if not content_words(sentence) & words:
                regions = None if sample.regions is None else np.minimum(sample.regions, np.uint8(OTHER))
                mask = np.zeros_like(sample.mask)
                return sample._replace(sentence=sentence, mask=mask, no_target=True, regions=regions)
        return sample


def content_words(sentence: str) -> set[str]:
    """The words of a sentence that say what is meant, in small letters and without a plural's s."""
    words = re.findall(r"[^\W\d_]+", sentence.lower())
    return {word.removesuffix("s") for word in words if word not in _COMMON and len(word) > 1}


@register_augmentation(options=NegativesOptions)
def negatives(options: NegativesOptions) -> Augmentation:
    """Build the augmentation of negatives. Raises UserError."""
    return Negatives(options)


@dataclass
class FlipOptions:
    """Horizontal flip with left and right exchanged in the sentence."""

    probability: float = 0.5
    """Share of samples that are flipped, before those that cannot be."""

    def check(self) -> None:
        """Raise UserError for a value out of range."""
        check_share("flip.probability", self.probability)


class Flip:
    """Mirrors picture and mask, and exchanges the words of sides; a sentence whose words cannot be is not flipped."""

    def __init__(self, options: FlipOptions) -> None:
        """Raises UserError for options out of range."""
        options.check()
        self.options = options

    def __call__(self, sample: RawSample, draw: "Draw", dataset: RawDataset) -> RawSample:
        rng = random_generator("flip", dataset.seed, draw)
        sentence = mirrored(sample.sentence)
        if rng.random() >= self.options.probability or sentence is None:
            return sample
        image = sample.image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        mirror = sample.moved(
            image, lambda pixels: np.ascontiguousarray(pixels[:, ::-1]), lambda x, y: (image.width - x, y)
        )
        return mirror._replace(sentence=sentence)


def mirrored(sentence: str) -> str | None:
    """The sentence of the mirrored picture: left for right and right for left, capitals kept.

    None where that could be wrong: with an ordinal and a side ("second from the left" counts on), where right or left
    is no side ("right behind"), and with clock times and points of the compass.
    """
    if _NOT_A_SIDE.search(sentence):
        return None
    if _SIDE.search(sentence) and _ORDINALS.search(sentence.lower()):
        return None

    def other(match: re.Match[str]) -> str:
        word = match[1]
        swapped = "right" if word.lower() == "left" else "left"
        return swapped.upper() if word.isupper() else swapped.capitalize() if word[0].isupper() else swapped

    return re.sub(rf"(?<![^\W\d_]){_SIDE.pattern}", other, sentence, flags=re.IGNORECASE)


@register_augmentation(options=FlipOptions)
def flip(options: FlipOptions) -> Augmentation:
    """Build the flip. Raises UserError."""
    return Flip(options)


@dataclass
class ScaleJitterOptions:
    """Large-scale jitter: the picture larger or smaller in a frame of its own size."""

    probability: float = 1.0
    """Share of samples that are scaled."""
    smallest: float = 0.5
    """Smallest factor; the rest of the frame is filled with the picture's mean colour."""
    largest: float = 2.0
    """Largest factor; what leaves the frame is cut off."""
    keep: float = 0.7
    """Least share of the referent's pixels that stays in the frame."""

    def check(self) -> None:
        """Raise UserError for a value out of range."""
        check_share("scale_jitter.probability", self.probability)
        check_share("scale_jitter.keep", self.keep)
        check_range("scale_jitter.smallest and largest", self.smallest, self.largest, 0.05, 10)


class ScaleJitter:
    """Scales picture and mask by one factor, and places them at random in a frame of the old size."""

    def __init__(self, options: ScaleJitterOptions) -> None:
        """Raises UserError for options out of range."""
        options.check()
        self.options = options

    def __call__(self, sample: RawSample, draw: "Draw", dataset: RawDataset) -> RawSample:
        options, (height, width) = self.options, sample.mask.shape
        rng = random_generator("scale_jitter", dataset.seed, draw)
        if rng.random() >= options.probability:
            return sample
        for _ in range(TRIES):
            factor = float(rng.uniform(options.smallest, options.largest))
            size = (max(1, round(height * factor)), max(1, round(width * factor)))
            mask = _resized(sample.mask, size)
            top, left = (_place(rng, frame, inside) for frame, inside in zip((height, width), size, strict=True))
            framed = _framed(mask, (height, width), top, left)
            if framed.sum() >= options.keep * mask.sum() and (framed.any() or not mask.any()):
                image = sample.image.resize(size[::-1], Image.Resampling.BILINEAR)
                canvas = Image.new("RGB", (width, height), _mean_colour(sample.image))
                canvas.paste(image, (left, top))
                move = partial(_scaled, size=size, frame=(height, width), top=top, left=left)
                by = (size[1] / width, size[0] / height)
                return sample.moved(canvas, move, partial(_scaled_point, by=by, left=left, top=top))
        return sample


def _place(rng: np.random.Generator, frame: int, inside: int) -> int:
    """Where the picture starts in the frame: inside it if it is smaller, else so that the frame is filled."""
    low, high = min(0, frame - inside), max(0, frame - inside)
    return int(rng.integers(low, high + 1))


def _scaled(
    pixels: NDArray[np.uint8], size: tuple[int, int], frame: tuple[int, int], top: int, left: int
) -> NDArray[np.uint8]:
    return _framed(_resized(pixels, size), frame, top, left)


def _scaled_point(x: float, y: float, by: tuple[float, float], left: int, top: int) -> tuple[float, float]:
    return x * by[0] + left, y * by[1] + top


def _framed(mask: NDArray[np.uint8], frame: tuple[int, int], top: int, left: int) -> NDArray[np.uint8]:
    """A mask placed in a frame, cut where it leaves it."""
    framed = np.zeros(frame, np.uint8)
    height, width = mask.shape
    rows = slice(max(top, 0), min(top + height, frame[0]))
    columns = slice(max(left, 0), min(left + width, frame[1]))
    framed[rows, columns] = mask[rows.start - top : rows.stop - top, columns.start - left : columns.stop - left]
    return framed


def _resized(mask: NDArray[np.uint8], size: tuple[int, int]) -> NDArray[np.uint8]:
    return np.asarray(Image.fromarray(mask).resize(size[::-1], Image.Resampling.NEAREST))


def _mean_colour(image: Image.Image) -> tuple[int, int, int]:
    red, green, blue = np.asarray(image.resize((8, 8))).reshape(-1, 3).mean(0).round().astype(int).tolist()
    return red, green, blue


@register_augmentation(options=ScaleJitterOptions)
def scale_jitter(options: ScaleJitterOptions) -> Augmentation:
    """Build the large-scale jitter. Raises UserError."""
    return ScaleJitter(options)


@dataclass
class ResizeCropOptions:
    """A part of the picture that keeps the whole referent; the transform resizes it to the network's size."""

    probability: float = 0.5
    """Share of samples that are cropped."""
    smallest: float = 0.5
    """Smallest share of each side that is kept."""

    def check(self) -> None:
        """Raise UserError for a value out of range."""
        check_share("resize_crop.probability", self.probability)
        check_range("resize_crop.smallest", self.smallest, 1.0, 0.05, 1)


class ResizeCrop:
    """Cuts a frame out of picture and mask that contains the referent's box; without a referent, any frame."""

    def __init__(self, options: ResizeCropOptions) -> None:
        """Raises UserError for options out of range."""
        options.check()
        self.options = options

    def __call__(self, sample: RawSample, draw: "Draw", dataset: RawDataset) -> RawSample:
        rng = random_generator("resize_crop", dataset.seed, draw)
        if rng.random() >= self.options.probability:
            return sample
        spans = []
        for axis, side in enumerate(sample.mask.shape):
            covered = np.flatnonzero(sample.mask.any(axis=1 - axis))
            first, last = (int(covered[0]), int(covered[-1]) + 1) if covered.size else (side, 0)
            length = max(round(side * float(rng.uniform(self.options.smallest, 1))), last - first, 1)
            start = int(rng.integers(max(0, last - length), min(first, side - length) + 1))
            spans.append(slice(start, start + length))
        rows, columns = spans
        image = sample.image.crop((columns.start, rows.start, columns.stop, rows.stop))
        cut = np.s_[rows, columns]
        return sample.moved(
            image, lambda pixels: np.ascontiguousarray(pixels[cut]), lambda x, y: (x - columns.start, y - rows.start)
        )


@register_augmentation(options=ResizeCropOptions)
def resize_crop(options: ResizeCropOptions) -> Augmentation:
    """Build the crop. Raises UserError."""
    return ResizeCrop(options)


@dataclass
class ColourJitterOptions:
    """Brightness, contrast, saturation and hue; sentences that name a colour are spared."""

    probability: float = 0.8
    """Share of samples that are changed, before those that are spared."""
    brightness: float = 0.3
    """Factors of brightness, contrast and saturation lie within 1 +- these values."""
    contrast: float = 0.3
    saturation: float = 0.3
    hue: float = 0.05
    """Largest turn of the hue, as a share of the circle, to either side."""

    def check(self) -> None:
        """Raise UserError for a value out of range."""
        for name in ("probability", "brightness", "contrast", "saturation"):
            check_share(f"colour_jitter.{name}", getattr(self, name))
        check_range("colour_jitter.hue", self.hue, 0.5, 0, 0.5)


class ColourJitter:
    """Changes a picture's colours; what a sentence says of colours stays true because such sentences are left out."""

    def __init__(self, options: ColourJitterOptions) -> None:
        """Raises UserError for options out of range."""
        options.check()
        self.options = options

    def __call__(self, sample: RawSample, draw: "Draw", dataset: RawDataset) -> RawSample:
        options = self.options
        rng = random_generator("colour_jitter", dataset.seed, draw)
        if rng.random() >= options.probability or names_a_colour(sample.sentence):
            return sample
        image = sample.image
        for enhancer, most in (
            (ImageEnhance.Brightness, options.brightness),
            (ImageEnhance.Contrast, options.contrast),
            (ImageEnhance.Color, options.saturation),
        ):
            image = enhancer(image).enhance(1 + float(rng.uniform(-most, most)))
        turn = round(float(rng.uniform(-options.hue, options.hue)) * 256)
        if turn:
            pixels = np.array(image.convert("HSV"))
            pixels[..., 0] += np.uint8(turn % 256)
            image = Image.fromarray(pixels, "HSV").convert("RGB")
        return sample._replace(image=image)


def names_a_colour(sentence: str) -> bool:
    """Whether a sentence has a word of a colour or of light and dark."""
    return bool(_COLOURS & set(re.findall(r"[^\W\d_]+", sentence.lower())))


@register_augmentation(options=ColourJitterOptions)
def colour_jitter(options: ColourJitterOptions) -> Augmentation:
    """Build the colour jitter. Raises UserError."""
    return ColourJitter(options)


@dataclass
class LabelNoiseOptions:
    """Wrong masks for a share of the training samples, to study how a method bears them."""

    share: float = 0.35
    """Share of the samples whose mask is wrong."""
    kind: Literal["swap", "shift"] = "swap"
    """swap: the mask of another referent of the picture, shifted where there is none; shift: the own mask moved."""
    smallest: float = 0.25
    """Least distance of a shift, as a share of the picture's sides; the mask wraps around."""

    def check(self) -> None:
        """Raise UserError for a value out of range."""
        check_share("label_noise.share", self.share)
        check_range("label_noise.smallest", self.smallest, 0.5, 0, 0.5)
        if self.kind not in ("swap", "shift"):
            raise UserError(f"label_noise.kind is {self.kind!r}; it is swap or shift")


class LabelNoise:
    """Gives a share of the samples a wrong mask. Which ones is a function of seed and sample, not of the epoch.

    Put it first in `data.augment`: other augmentations then move the wrong mask as they would move the right one.
    A sentence without a target keeps its empty mask.
    """

    def __init__(self, options: LabelNoiseOptions) -> None:
        """Raises UserError for options out of range."""
        options.check()
        self.options = options

    def is_wrong(self, seed: int, index: int) -> bool:
        """Whether the sample gets a wrong mask."""
        return bool(self._generator(seed, index).random() < self.options.share)

    def __call__(self, sample: RawSample, draw: "Draw", dataset: RawDataset) -> RawSample:
        rng = self._generator(dataset.seed, draw.index)
        if rng.random() >= self.options.share or sample.no_target:
            return sample
        others = dataset.other_masks(draw.index) if self.options.kind == "swap" else []
        if others:
            return sample._replace(mask=others[int(rng.integers(len(others)))])
        least, sides = self.options.smallest, sample.mask.shape
        steps = [round(side * float(rng.uniform(least, 1 - least))) for side in sides]
        return sample._replace(mask=np.roll(sample.mask, steps, axis=(0, 1)))

    def summary(self, dataset: RawDataset) -> str:
        """How many samples of a training set are drawn; those without a target among them keep their empty mask."""
        wrong = sum(self.is_wrong(dataset.seed, index) for index in range(len(dataset)))
        return f"{wrong:,} of {len(dataset):,} samples, {wrong / max(len(dataset), 1):.1%}"

    def _generator(self, seed: int, index: int) -> np.random.Generator:
        from amltrain.records import Draw  # imports torch

        return random_generator("label_noise", seed, Draw(0, index))


@register_augmentation(options=LabelNoiseOptions)
def label_noise(options: LabelNoiseOptions) -> Augmentation:
    """Build the label noise. Raises UserError."""
    return LabelNoise(options)
