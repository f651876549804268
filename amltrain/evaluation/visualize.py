"""Pictures for people: a mask over its image under its sentence, and sheets of predictions beside the truth."""

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter, ImageFont

Colour = tuple[int, int, int]

PREDICTION: Colour = (255, 122, 0)
TRUTH: Colour = (0, 158, 96)
INK: Colour = (33, 37, 41)
FAINT: Colour = (120, 128, 136)
PAPER: Colour = (255, 255, 255)


class Example(NamedTuple):
    """One cell of a sheet. image: RGB; prediction, truth: [height, width] bool at its size; note: e.g. the IoU."""

    image: Image.Image
    sentence: str
    prediction: NDArray[np.bool_]
    truth: NDArray[np.bool_] | None = None
    note: str = ""


def tint(
    image: Image.Image,
    mask: NDArray[np.bool_],
    colour: Colour = PREDICTION,
    opacity: float = 0.25,
    side: int | None = None,
) -> Image.Image:
    """Outline the masked pixels, with a white rim that shows on an object of the same colour, and tint them faintly.

    image: RGB of any size; mask: [height, width] bool at that size; opacity: 0..1 of the fill, 0 = the outline alone;
    side: scale the longer side to so many pixels first (outlines stay sharp on tiny images). Returns RGB.
    """
    image = image.convert("RGB")
    area = Image.fromarray(mask.astype(np.uint8) * 255)
    if side is not None:
        scale = side / max(image.size)
        size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
        image = image.resize(size, Image.Resampling.BICUBIC)
        area = area.resize(size, Image.Resampling.BILINEAR).point(lambda v: 255 if v > 127 else 0)
    fill = Image.new("RGB", image.size, colour)
    image = Image.composite(Image.blend(image, fill, opacity), image, area)
    width = max(1, round(max(image.size) / 110))
    within, rim = _shrunk(area, width), _shrunk(area, width + max(1, width // 2))
    image = Image.composite(Image.new("RGB", image.size, PAPER), image, _without(within, rim))
    return Image.composite(fill, image, _without(area, within))


def _shrunk(area: Image.Image, pixels: int) -> Image.Image:
    return area.filter(ImageFilter.MinFilter(2 * pixels + 1))


def _without(area: Image.Image, part: Image.Image) -> Image.Image:
    return Image.fromarray(np.asarray(area) & ~np.asarray(part))


def overlay(image: Image.Image, mask: NDArray[np.bool_], sentence: str, note: str = "") -> Image.Image:
    """An image with its mask under its sentence, for one prediction; at least 480 pixels wide or high.

    mask: [height, width] bool at the image's size; note: small print below, e.g. probability and area.
    """
    picture = tint(image, mask, side=max(480, *image.size))
    return _captioned([(picture, note)], sentence, _font(19), _font(14))


def sheet(examples: Sequence[Example], columns: int = 2, side: int = 220) -> Image.Image:
    """Examples in a grid, each the truth (green, where there is one) beside the prediction (orange).

    The truth is an outline alone, so that the objects keep the colours that sentences name.
    side: longest side of a picture in pixels. Returns a small blank page when there are no examples.
    """
    cells = []
    for e in examples:
        panels = [] if e.truth is None else [(tint(e.image, e.truth, TRUTH, opacity=0, side=side), "truth")]
        panels.append((tint(e.image, e.prediction, PREDICTION, side=side), f"prediction  {e.note}"))
        cells.append(_captioned(panels, e.sentence, _font(14), _font(12), side))
    if not cells:
        return Image.new("RGB", (side, side), PAPER)
    rows = [cells[i : i + columns] for i in range(0, len(cells), columns)]
    width = max(c.width for c in cells)
    heights = [max(c.height for c in row) for row in rows]
    page = Image.new("RGB", (width * len(rows[0]), sum(heights)), PAPER)
    top = 0
    for row, height in zip(rows, heights, strict=True):
        for i, cell in enumerate(row):
            page.paste(cell, (i * width, top))
        top += height
    return page


def _captioned(
    panels: Sequence[tuple[Image.Image, str]],
    title: str,
    font: ImageFont.FreeTypeFont,
    small: ImageFont.FreeTypeFont,
    panel_width: int = 0,
) -> Image.Image:
    """Panels side by side, each over its note, under a wrapped title. A panel takes at least panel_width."""
    margin, gap, line = round(font.size), round(font.size / 2), round(1.35 * font.size)
    widths = [max(panel_width, picture.width) for picture, _ in panels]
    width = sum(widths) + gap * (len(panels) - 1)
    lines = textwrap.wrap(title, max(12, int(width / (0.58 * font.size)))) or [""]
    pictures = max(picture.height for picture, _ in panels)
    page = Image.new("RGB", (width + 2 * margin, 3 * gap + line * len(lines) + pictures + 2 * round(small.size)), PAPER)
    draw = ImageDraw.Draw(page)
    draw.multiline_text((margin, gap), "\n".join(lines), fill=INK, font=font, spacing=line - round(font.size * 1.15))
    top, left = gap + line * len(lines) + gap, margin
    for (picture, note), taken in zip(panels, widths, strict=True):
        page.paste(picture, (left, top))
        draw.text((left, top + picture.height + gap // 2), note, fill=FAINT, font=small)
        left += taken + gap
    return page


def _font(size: int) -> ImageFont.FreeTypeFont:
    """Matplotlib's DejaVu Sans: Pillow's own font has no letters beyond ASCII."""
    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf", size)
