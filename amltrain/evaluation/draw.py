"""Draw masks over images: single overlays, and sheets of predictions next to the ground truth.

The width of an outline grows with the picture, so the filters here must not: shrinking a mask by n pixels takes about
2 log2(n) passes over it (0.2 s at 4000 x 3000 pixels).

A sheet of the predictions that an evaluation kept.
"""

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from amltrain.evaluation.results import Prediction, Results
from amltrain.files import new_file
from amltrain.run_folder import CAPTION

Colour = tuple[int, int, int]

PREDICTION: Colour = (255, 122, 0)
TRUTH: Colour = (0, 158, 96)
INK: Colour = (33, 37, 41)
FAINT: Colour = (120, 128, 136)
PAPER: Colour = (255, 255, 255)
OVERLAY_SIDE = 1600
"""Longest side of an overlay by default, pixels: what a screen shows."""


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
    """Outline the masked pixels and fill them faintly; a white rim makes the outline visible on any colour.

    image: RGB of any size; mask: [height, width] bool at that size; opacity: 0..1 of the fill, 0 = the outline alone;
    side: scale the longer side to this many pixels first (outlines stay sharp on tiny images). Returns RGB.
    """
    image = image.convert("RGB")
    if side is not None and side != max(image.size):
        image, mask = _scaled(image, mask, side)
    if not mask.any():
        return image
    width = max(1, round(max(image.size) / 110))
    top, bottom, left, right = _bounds(mask)  # nothing outside them changes
    inner = mask[top:bottom, left:right]
    pixels = np.array(image)
    part = pixels[top:bottom, left:right]
    within = shrink(_framed(mask, top, bottom, left, right), width)
    rim = shrink(within, max(1, width // 2))
    cut = tuple(slice(1, 1 + n) for n in inner.shape)
    within, rim = within[cut], rim[cut]
    for channel, value in enumerate(colour):
        blended = (np.arange(256) * (1 - opacity) + value * opacity).round().astype(np.uint8)
        part[..., channel] = np.where(inner, blended[part[..., channel]], part[..., channel])
    part[within & ~rim] = PAPER
    part[inner & ~within] = colour
    return Image.fromarray(pixels)


def shrink(mask: NDArray[np.bool_], pixels: int) -> NDArray[np.bool_]:
    """Shrink a mask by a number of pixels on every side; the image border does not count as a side.

    mask: [height, width] bool. The time grows with the logarithm of `pixels` only.
    """
    for axis in (0, 1):
        margin = [(pixels, pixels) if a == axis else (0, 0) for a in (0, 1)]
        mask = np.moveaxis(np.pad(mask, margin, constant_values=True), axis, 0)
        covered, window = 1, 2 * pixels + 1  # mask[i] is True if all `covered` pixels from i on are set
        while covered < window:
            step = min(covered, window - covered)
            mask = mask[:-step] & mask[step:]
            covered += step
        mask = np.moveaxis(mask, 0, axis)
    return mask


def _bounds(mask: NDArray[np.bool_]) -> tuple[int, int, int, int]:
    """First and last (exclusive) row and column that hold a masked pixel."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return int(rows[0]), int(rows[-1]) + 1, int(columns[0]), int(columns[-1]) + 1


def _framed(mask: NDArray[np.bool_], top: int, bottom: int, left: int, right: int) -> NDArray[np.bool_]:
    """Crop a mask to its bounds plus one pixel; outside the image counts as masked."""
    height, width = mask.shape
    framed = np.ones((bottom - top + 2, right - left + 2), bool)
    framed[1:-1, 1:-1] = mask[top:bottom, left:right]
    framed[0], framed[-1] = framed[0] & (top == 0), framed[-1] & (bottom == height)
    framed[:, 0], framed[:, -1] = framed[:, 0] & (left == 0), framed[:, -1] & (right == width)
    return framed


def _scaled(image: Image.Image, mask: NDArray[np.bool_], side: int) -> tuple[Image.Image, NDArray[np.bool_]]:
    scale = side / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    smooth = Image.fromarray(mask.astype(np.uint8) * 255).resize(size, Image.Resampling.BILINEAR)
    return image.resize(size, Image.Resampling.BICUBIC, reducing_gap=3), np.asarray(smooth) > 127


def overlay(
    image: Image.Image, mask: NDArray[np.bool_], sentence: str, note: str = "", side: int | None = OVERLAY_SIDE
) -> Image.Image:
    """Draw one prediction over its image, with the sentence above it.

    mask: [height, width] bool at the image's size; note: small print below, e.g. probability and area; side: limit of
    the longer side in pixels, None = the image's own size. Small images are enlarged to 480 pixels.
    """
    longest = max(image.size)
    picture = tint(image, mask, side=max(480, longest if side is None else min(longest, side)))
    scale = max(1.0, max(picture.size) / 1600)
    return _captioned([(picture, note)], sentence, _font(round(19 * scale)), _font(round(14 * scale)))


def sheet(examples: Sequence[Example], columns: int = 2, side: int = 220) -> Image.Image:
    """Draw examples in a grid: the ground truth (green, if any) next to the prediction (orange).

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
    """Panels side by side, each over its wrapped note, under a wrapped title. A panel takes at least panel_width."""
    margin, gap, line = round(font.size), round(font.size / 2), round(1.35 * font.size)
    widths = [max(panel_width, picture.width) for picture, _ in panels]
    width = sum(widths) + gap * (len(panels) - 1)
    lines = textwrap.wrap(title, max(12, int(width / (0.58 * font.size)))) or [""]
    notes = [_wrapped(note, taken, small) for (_, note), taken in zip(panels, widths, strict=True)]
    under = round(1.35 * small.size) * max(note.count("\n") + 1 for note in notes)
    pictures = max(picture.height for picture, _ in panels)
    height = 3 * gap + line * len(lines) + pictures + under + round(0.65 * small.size)
    page = Image.new("RGB", (width + 2 * margin, height), PAPER)
    draw = ImageDraw.Draw(page)
    draw.multiline_text((margin, gap), "\n".join(lines), fill=INK, font=font, spacing=line - round(font.size * 1.15))
    top, left = gap + line * len(lines) + gap, margin
    for (picture, _), note, taken in zip(panels, notes, widths, strict=True):
        page.paste(picture, (left, top))
        draw.multiline_text((left, top + picture.height + gap // 2), note, fill=FAINT, font=small)
        left += taken + gap
    return page


def _wrapped(text: str, width: int, font: ImageFont.FreeTypeFont) -> str:
    """Break a text into lines of at most `width` pixels."""
    letters = max(1, int(width * len(text) / max(1.0, font.getlength(text))))
    while letters > 8 and any(font.getlength(line) > width for line in textwrap.wrap(text, letters)):
        letters -= 1
    return "\n".join(textwrap.wrap(text, letters))


def _font(size: int) -> ImageFont.FreeTypeFont:
    """Matplotlib's DejaVu Sans: Pillow's own font has no letters beyond ASCII."""
    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf", size)


def prediction_sheet(results: Results, dataset: Any, columns: int = 2) -> Image.Image:
    """Sentence, truth and prediction of every kept sample.

    dataset: the one evaluated; `picture(sample_id)` gives the RGB image, `info(sample_id)` the sentence.
    """
    return sheet([_example(p, dataset) for p in results.predictions], columns)


def best_example(results: Results, dataset: Any) -> tuple[Image.Image, str] | None:
    """The kept prediction with the highest IoU as a picture, and its caption; None where no kept sample has a referent.

    dataset: as for `prediction_sheet`.
    """
    kept = [(_iou(p), p) for p in results.predictions if p.truth.any()]
    if not kept:
        return None
    iou, best = max(kept, key=lambda entry: entry[0])
    place = f"the {len(kept)} predictions drawn of {results.dataset} {results.split}"
    caption = f"The best of {place}: IoU {100 * iou:.1f}. Truth left, prediction right."
    if iou == 0:
        caption = f"None of {place} overlaps its truth (IoU 0); this is one of them. Truth left, prediction right."
    return sheet([_example(best, dataset)], columns=1, side=320), caption


def _iou(prediction: Prediction) -> float:
    """IoU 0..1 of a prediction whose truth is not empty."""
    if prediction.predicted_no_target:
        return 0.0
    both = np.count_nonzero(prediction.mask & prediction.truth)
    return both / np.count_nonzero(prediction.mask | prediction.truth)


def save_picture(picture: Image.Image, path: Path, caption: str = "") -> None:
    """Write a PNG, with its caption as the file's description. Raises UserError when it cannot be written."""
    about = PngInfo()
    if caption:
        about.add_itxt(CAPTION, caption)
    with new_file(path) as temporary:
        picture.save(temporary, "PNG", pnginfo=about)


def _example(prediction: Prediction, dataset: Any) -> Example:
    image, sentence = dataset.picture(prediction.sample_id), dataset.info(prediction.sample_id).sentence
    return Example(image, sentence, prediction.mask, prediction.truth, _note(prediction))


def _note(prediction: Prediction) -> str:
    if prediction.predicted_no_target:
        return '"nothing in this image"' + ("" if prediction.truth.any() else ", right")
    if not prediction.truth.any():
        return "nothing was meant"
    return f"IoU {100 * _iou(prediction):.1f}"
