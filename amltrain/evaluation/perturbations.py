"""Images made harder, to measure robustness: the seven transformations of the AML paper and occlusion by area.

Each is a function of the image, its severity, the seed and the sample alone: the same picture on every machine, at any
process count and in any order. Severity 1 is the default; 0 leaves the image as it is (occlusion by area: its share is
the severity).

The paper (arXiv 2602.22740, robustness protocol: trained on RefCOCO+, tested on RefCOCO and RefCOCOg) names the seven
transformations but not their factors. The factors below are ours; figures are comparable only at the same factors.

| name        | at severity s                                                                            |
|-------------|------------------------------------------------------------------------------------------|
| haze        | white overlay of opacity 0.5 s                                                           |
| highlight   | brightness x (1 + 0.8 s)                                                                 |
| low_light   | brightness x (1 - 0.6 s)                                                                 |
| contrast    | contrast around the mean grey x (1 + 1.0 s)                                              |
| occlusion   | one grey square, side 0.4 s of the short side, anywhere inside the image                 |
| patches     | three black rectangles, each side 0.1 to 0.1 + 0.2 s of the image's, anywhere inside     |
| jitter      | brightness, contrast, saturation each x (1 - 0.5 s) to (1 + 0.5 s)                       |
| occluded    | a share s of the 32 px blocks of the image grey (the paper's test at 0 / 30 / 50 %)      |
"""

import zlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from PIL import Image

from amltrain.errors import UserError, unknown_name
from amltrain.randomness import random_key

Pixels = NDArray[np.float32]  # [H, W, 3], 0..255

GREY = 127.5
BLOCK = 32
_LUMA = np.array([0.299, 0.587, 0.114], dtype=np.float32)  # ITU-R 601, as PIL's "L"


@dataclass(frozen=True)
class Perturbation:
    """A named transformation of test images; `describe()` goes into results.json.

    Called with (image, sample_id); severity as in the table above, in 0..`LIMITS`.
    """

    name: str
    severity: float = 1.0
    seed: int = 0

    def __call__(self, image: Image.Image, sample_id: int) -> Image.Image:
        """Perturb an RGB image; any size; returns a new image of that size."""
        key = random_key(self.seed, zlib.crc32(self.name.encode()), sample_id)
        rng = np.random.default_rng(key % (1 << 64))
        pixels = np.asarray(image.convert("RGB"), dtype=np.float32).copy()
        changed = PERTURBATIONS[self.name](pixels, self.severity, rng)
        return Image.fromarray(np.clip(np.rint(changed), 0, 255).astype(np.uint8))

    def describe(self) -> dict[str, object]:
        return {"name": self.name, "severity": self.severity, "seed": self.seed}


def build_perturbation(name: str, severity: float | None = None, seed: int = 0) -> Perturbation:
    """A perturbation by name, at its default severity unless one is given. Raises UserError where either is bad."""
    if name not in PERTURBATIONS:
        raise unknown_name("perturbation", name, PERTURBATIONS)
    severity = DEFAULTS.get(name, 1.0) if severity is None else severity
    limit = LIMITS.get(name, 2.0)
    if not 0 <= severity <= limit:
        raise UserError(f"severity {severity} of {name} must lie between 0 and {limit}")
    return Perturbation(name, severity, seed)


def haze(pixels: Pixels, severity: float, rng: Generator) -> Pixels:
    """Blend with white; severity 1 covers half."""
    opacity = 0.5 * severity
    return pixels * (1 - opacity) + 255 * opacity


def highlight(pixels: Pixels, severity: float, rng: Generator) -> Pixels:
    """Brighten; severity 1 multiplies by 1.8."""
    return pixels * (1 + 0.8 * severity)


def low_light(pixels: Pixels, severity: float, rng: Generator) -> Pixels:
    """Darken; severity 1 leaves 40 %."""
    return pixels * (1 - 0.6 * severity)


def contrast(pixels: Pixels, severity: float, rng: Generator) -> Pixels:
    """Raise the contrast; severity 1 doubles it."""
    return _contrast(pixels, 1 + severity)


def occlusion(pixels: Pixels, severity: float, rng: Generator) -> Pixels:
    """Put one grey square at a random place; severity 1 has 40 % of the shorter side."""
    side = round(0.4 * severity * min(pixels.shape[:2]))
    return _fill(pixels, side, side, GREY, rng)


def patches(pixels: Pixels, severity: float, rng: Generator) -> Pixels:
    """Put several grey squares at random places."""
    if severity == 0:
        return pixels
    for _ in range(3):
        height, width = (0.1 + 0.2 * severity * rng.random(2)) * pixels.shape[:2]
        pixels = _fill(pixels, round(height), round(width), 0.0, rng)
    return pixels


def jitter(pixels: Pixels, severity: float, rng: Generator) -> Pixels:
    """Change brightness, contrast and saturation at random."""
    brightness, contrasted, saturation = 1 + severity * rng.uniform(-0.5, 0.5, 3)
    pixels = _contrast(np.clip(pixels * brightness, 0, 255), contrasted)
    grey = (np.clip(pixels, 0, 255) @ _LUMA)[..., None]
    return grey + (np.clip(pixels, 0, 255) - grey) * saturation


def occluded(pixels: Pixels, severity: float, rng: Generator) -> Pixels:
    """Cover a share of the image, `severity`, with blocks at random places."""
    rows, columns = (-(-side // BLOCK) for side in pixels.shape[:2])
    chosen = rng.permutation(rows * columns)[: round(severity * rows * columns)]
    for block in chosen:
        y, x = divmod(int(block), columns)
        pixels[y * BLOCK : (y + 1) * BLOCK, x * BLOCK : (x + 1) * BLOCK] = GREY
    return pixels


def _contrast(pixels: Pixels, factor: float) -> Pixels:
    mean = (pixels @ _LUMA).mean()
    return (mean + (pixels - mean) * factor).astype(np.float32)


def _fill(pixels: Pixels, height: int, width: int, value: float, rng: Generator) -> Pixels:
    """A rectangle of one value at a random place wholly inside the image."""
    height, width = min(height, pixels.shape[0]), min(width, pixels.shape[1])
    top = int(rng.integers(pixels.shape[0] - height + 1))
    left = int(rng.integers(pixels.shape[1] - width + 1))
    pixels[top : top + height, left : left + width] = value
    return pixels


PERTURBATIONS: dict[str, Callable[[Pixels, float, Generator], Pixels]] = {
    f.__name__: f for f in (haze, highlight, low_light, contrast, occlusion, patches, jitter, occluded)
}
PAPER = ("haze", "highlight", "low_light", "contrast", "occlusion", "patches", "jitter")
DEFAULTS = {"occluded": 0.3}
LIMITS = {"low_light": 1.6, "occluded": 1.0}
"""Largest severity where it is not 2; low light at 1.6 is all but black."""
