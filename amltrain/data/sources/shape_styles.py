"""What scenes of RefShapes may hold: forms, colours, how many objects, how big, and on what ground.

simple      4 forms, 6 colours, 3 to 6 objects on a grey ground
cluttered   9 forms, 9 colours, 4 to 8 smaller objects on a ground of coloured stains and small shards
alike       as cluttered, with 7 objects of one form in every scene
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image, ImageDraw

Points = list[tuple[float, float]]

COLOURS = {
    "red": (208, 48, 44),
    "green": (40, 180, 60),
    "blue": (50, 84, 200),
    "yellow": (226, 196, 48),
    "purple": (140, 62, 168),
    "white": (238, 238, 238),
}
MORE_COLOURS = {"orange": (236, 132, 32), "pink": (240, 150, 190), "cyan": (60, 200, 210)}


def _regular(corners: int, turn: float, inner: float = 1.0) -> Points:
    """Corners on the unit circle from angle `turn`; every other one at radius `inner`."""
    angles = [turn + 2 * math.pi * corner / corners for corner in range(corners)]
    reach = [inner if corner % 2 else 1.0 for corner in range(corners)]
    return [(r * math.cos(a), r * math.sin(a)) for r, a in zip(reach, angles, strict=True)]


UP = -math.pi / 2
_BAR = 0.34
OUTLINES: dict[str, Points] = {
    "square": _regular(4, math.pi / 4),
    "circle": _regular(24, 0.0),
    "triangle": _regular(3, UP),
    "star": _regular(10, UP, 0.5),
    "pentagon": _regular(5, UP),
    "cross": [
        (_BAR, -0.94), (_BAR, -_BAR), (0.94, -_BAR), (0.94, _BAR), (_BAR, _BAR), (_BAR, 0.94),
        (-_BAR, 0.94), (-_BAR, _BAR), (-0.94, _BAR), (-0.94, -_BAR), (-_BAR, -_BAR), (-_BAR, -0.94),
    ],
    "arrow": [(0, -1), (0.8, -0.1), (0.3, -0.1), (0.3, 0.95), (-0.3, 0.95), (-0.3, -0.1), (-0.8, -0.1)],
    "moon": [(math.cos(a), math.sin(a)) for a in np.linspace(0.9, 2 * math.pi - 0.9, 20).tolist()]
    + [(0.62 - 0.78 * math.cos(a), 0.78 * math.sin(a)) for a in np.linspace(-1.5, 1.5, 12).tolist()],
    "heart": [
        (0.0, 0.95), (-0.9, 0.05), (-0.97, -0.35), (-0.75, -0.7), (-0.4, -0.75), (0.0, -0.4),
        (0.4, -0.75), (0.75, -0.7), (0.97, -0.35), (0.9, 0.05),
    ],
}  # fmt: skip
"""Corners (x, y) inside the unit circle, y down."""
FORMS = ("square", "circle", "triangle", "star")


@dataclass(frozen=True)
class SceneStyle:
    """forms: names in OUTLINES. colours: name to RGB. objects, crowded: lowest and highest number of objects, crowded
    of testB. small, big: lowest and highest radius as a share of the scene's side. ground: draws [S, S, 3] uint8.
    one_form: all objects of a scene have the same form.
    """

    forms: tuple[str, ...]
    colours: dict[str, tuple[int, int, int]]
    objects: tuple[int, int]
    crowded: tuple[int, int]
    small: tuple[float, float]
    big: tuple[float, float]
    ground: Callable[[np.random.Generator, int], np.ndarray]
    one_form: bool = False


def grey_ground(generator: np.random.Generator, size: int) -> np.ndarray:
    """A grey ground with a slope and grain, [S, S, 3] uint8."""
    slope = np.linspace(-1, 1, size)
    level = generator.uniform(80, 140)
    ground = level + generator.uniform(-25, 25) * slope[:, None] + generator.uniform(-25, 25) * slope[None]
    ground = ground[..., None] + generator.normal(0, 9, (size, size, 3))
    return ground.clip(0, 255).astype(np.uint8)


def cluttered_ground(generator: np.random.Generator, size: int) -> np.ndarray:
    """Stains of dull colours with 20 to 40 small shards of brighter ones and grain, [S, S, 3] uint8."""
    stains = generator.uniform(40, 190, (6, 6, 3)).astype(np.uint8)
    canvas = Image.fromarray(stains).resize((size, size), Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(canvas)
    for _ in range(int(generator.integers(20, 41))):
        x, y = generator.uniform(0, size, 2).tolist()
        angles = np.sort(generator.uniform(0, 2 * math.pi, 5))
        reach = generator.uniform(0.015, 0.05, 5) * size
        corners = zip((x + reach * np.cos(angles)).tolist(), (y + reach * np.sin(angles)).tolist(), strict=True)
        draw.polygon(list(corners), fill=tuple(generator.integers(30, 240, 3).tolist()))
    noisy = np.asarray(canvas) + generator.normal(0, 9, (size, size, 3))
    return noisy.clip(0, 255).astype(np.uint8)


SIMPLE = SceneStyle(FORMS, COLOURS, (3, 4), (5, 6), (0.155, 0.175), (0.2, 0.24), grey_ground)
CLUTTERED = SceneStyle(
    tuple(OUTLINES), COLOURS | MORE_COLOURS, (4, 6), (6, 8), (0.11, 0.135), (0.17, 0.21), cluttered_ground
)
STYLES = {
    "simple": SIMPLE,
    "cluttered": CLUTTERED,
    "alike": replace(CLUTTERED, objects=(7, 7), crowded=(7, 7), small=(0.1, 0.12), big=(0.14, 0.165), one_form=True),
}
