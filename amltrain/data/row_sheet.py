"""`rows.jpg`: some random rows of a prepared data set as pictures, for inspection."""

import hashlib
import io
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont, ImageOps

from amltrain.data.images import to_rgb
from amltrain.data.segmentation import decode_rle
from amltrain.data.sources.annotations import ImageGroup

ROWS = 8
COLUMNS = 4
SIDE, TEXT = 260, 78
LINE = 60
"""Letters of a line; Pillow would draw all of a longer one, most of it outside the picture."""
SHADE = 0.45
"""Brightness of the pixels outside the mask."""


class _Shown(NamedTuple):
    order: str
    split: str
    group: ImageGroup


class RowSheet:
    """Keeps the ROWS rows whose hashes are lowest: a random choice that is always the same for the same data."""

    def __init__(self) -> None:
        self._kept: list[_Shown] = []

    def offer(self, split: str, group: ImageGroup) -> None:
        """Consider a row."""
        order = hashlib.sha256(f"{split} {group.file_name}".encode(errors="replace")).hexdigest()
        if len(self._kept) < ROWS or order < self._kept[-1].order:
            self._kept = sorted([*self._kept, _Shown(order, split, group)], key=lambda shown: shown.order)[:ROWS]

    def save(self, path: Path) -> None:
        """Write the sheet. Raises OSError. Without any row nothing is written."""
        if not self._kept:
            return
        sheet = grid([_tile(shown) for shown in self._kept], min(COLUMNS, len(self._kept)))
        sheet.save(path, quality=90, subsampling=0)  # a PNG takes twenty times as long


def _tile(shown: _Shown) -> Image.Image:
    """Draw one referent of the row on its image, with its sentence."""
    group = shown.group
    assert group.content is not None
    referent = group.referents[int(shown.order[:8], 16) % len(group.referents)]
    image: Image.Image = Image.open(io.BytesIO(group.content))
    scale = SIDE / max(group.height, group.width)
    size = (max(1, round(group.width * scale)), max(1, round(group.height * scale)))
    turned = image.size == (group.height, group.width) != (group.width, group.height)
    image.draft("RGB", size[::-1] if turned else size)  # a JPEG is decoded at about the size that is shown
    image = to_rgb(ImageOps.exif_transpose(image) if turned else image).resize(size, Image.Resampling.BILINEAR)
    if not referent["no_target"]:
        mask = Image.fromarray(decode_rle(referent["mask"]) * np.uint8(255)).resize(size, Image.Resampling.BOX)
        image = Image.fromarray(_outlined(np.asarray(image), np.asarray(mask) > 0))
    tile = Image.new("RGB", (SIDE, SIDE + TEXT), "white")
    tile.paste(image, (0, 0))
    about = "nothing in this image" if referent["no_target"] else f"{referent['category'] or 'object'}"
    text = f"{shown.split}, ref {referent['ref_id']}, {about}, {len(referent['sentences'])} sentence(s)"
    lines = [text[:LINE], *textwrap.wrap(referent["sentences"][0]["raw"][: 8 * LINE], LINE * 2 // 3)[:4]]
    ImageDraw.Draw(tile).multiline_text((2, SIDE + 2), "\n".join(lines), fill="black", font=ImageFont.load_default(12))
    return tile


def sample_tile(image: Image.Image, mask: NDArray[np.uint8], caption: str) -> Image.Image:
    """Draw a sample: its image with the mask outlined, and a caption. An empty mask leaves the image as it is."""
    scale = SIDE / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    shown = image.convert("RGB").resize(size, Image.Resampling.BILINEAR)
    if mask.any():
        covered = np.asarray(Image.fromarray(mask * np.uint8(255)).resize(size, Image.Resampling.BOX)) > 0
        shown = Image.fromarray(_outlined(np.asarray(shown), covered))
    tile = Image.new("RGB", (SIDE, SIDE + TEXT), "white")
    tile.paste(shown, (0, 0))
    text = "\n".join(textwrap.wrap(caption[: 8 * LINE], LINE * 2 // 3)[:5])
    ImageDraw.Draw(tile).multiline_text((2, SIDE + 2), text, fill="black", font=ImageFont.load_default(12))
    return tile


def grid(tiles: Sequence[Image.Image], columns: int) -> Image.Image:
    """Put tiles of one size side by side, row by row."""
    rows = -(-len(tiles) // columns)
    sheet = Image.new("RGB", (columns * (SIDE + 8) + 8, rows * (SIDE + TEXT + 8) + 8), "white")
    for number, tile in enumerate(tiles):
        row, column = divmod(number, columns)
        sheet.paste(tile, (8 + column * (SIDE + 8), 8 + row * (SIDE + TEXT + 8)))
    return sheet


def _outlined(pixels: NDArray[np.uint8], mask: NDArray[np.bool_]) -> NDArray[np.uint8]:
    """Darken what is outside the mask, and draw its border as a white line beside a black one: seen on every colour."""
    drawn = np.where(mask[..., None], pixels, (pixels * np.float32(SHADE)).astype(np.uint8))
    around = np.pad(mask, 1, mode="edge")
    neighbours = [around[:-2, 1:-1], around[2:, 1:-1], around[1:-1, :-2], around[1:-1, 2:]]
    drawn[np.any(neighbours, axis=0) & ~mask] = 0
    drawn[mask & ~np.all(neighbours, axis=0)] = 255
    return drawn
