"""NeMo's mosaic: the sample's image becomes one cell of a grid of images, and the sentence must find it.

Paper: Ha et al., "Finding NeMo: Negative-mined Mosaic Augmentation for Referring Image Segmentation", ECCV 2024.
Official code: github.com/snuviplab/NeMo (MIT), one data loader; no models, no rankings, no values of its options.
Kept: grids of 4 or 9 cells, a uniform or word-chosen cell, random companions, companions from a ranking of images by a
dual encoder without those above a similarity ceiling, an epoch from which retrieval begins, optional blur.
Different: a sample's own image is never its own companion; words are matched whole ("bright" is not "right"); a grid
always fills the canvas; images are resized with antialiasing; a sample that is not a mosaic keeps its protocol's
resize; too few ranked candidates are filled up with random companions. Not kept: the random cross point, which crashes
there. The default values are ours.
"""

import logging
import re
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from amltrain.data.augment import Augmentation, RawDataset, RawSample, random_generator, register_augmentation
from amltrain.errors import UserError

if TYPE_CHECKING:
    from amltrain.records import Draw

logger = logging.getLogger(__name__)
TAIL = 300
"""Where a similarity ceiling leaves no candidate, the official code draws from this many last ranks."""
_CELLS = {
    "left": {0, 2}, "right": {1, 3},
    "top": {0, 1}, "high": {0, 1}, "above": {0, 1},
    "bottom": {2, 3}, "low": {2, 3}, "below": {2, 3}, "under": {2, 3}, "beneath": {2, 3},
}  # fmt: skip
"""Cells of a 2 x 2 grid, row by row, that a word of place allows."""


@dataclass
class MosaicOptions:
    """NeMo's mosaic: the sample's image among companions in a grid."""

    probability: float = 0.5
    """Share of samples that become a mosaic."""
    grids: list[int] = field(default_factory=lambda: [4])
    """Numbers of cells to choose from, each a square: [4], or [4, 9] for both equally often."""
    rankings: str | None = None
    """Folder with ranking files of `amltrain data rank`; needed for retrieval only."""
    retrieval: float = 0.0
    """Share of mosaics whose companions come from the ranking of images for the sentence; the rest is random."""
    retrieval_epoch: int = 0
    """First epoch (from 0) with retrieved companions."""
    top_k: int = 100
    """Retrieved companions are drawn from this many best-ranked images."""
    max_text_similarity: float | None = None
    """Leave out retrieved images that fit the sentence better than this; null = no ceiling."""
    max_image_similarity: float | None = None
    """Leave out retrieved images more similar to the sample's image than this; null = no ceiling."""
    words_choose_cell: bool = False
    """On a 2 x 2 grid, put the image where the sentence's words of place (left, top, ...) allow."""
    blur: float = 0.0
    """Gaussian radius of the companions, pixels; NeMo's code has 100 as an option."""

    def check(self) -> None:
        """Raise UserError for a value out of range."""
        for name in ("probability", "retrieval"):
            value = getattr(self, name)
            if not 0 <= value <= 1:
                raise UserError(f"mosaic.{name} is {value} and must lie between 0 and 1")
        if not self.grids or any(cells not in (4, 9) for cells in self.grids):
            raise UserError(f"mosaic.grids is {self.grids} and must hold 4, 9 or both")
        if self.top_k < 1 or self.retrieval_epoch < 0 or self.blur < 0:
            raise UserError("mosaic.top_k must be at least 1, mosaic.retrieval_epoch and mosaic.blur at least 0")
        if self.retrieval and self.rankings is None:
            raise UserError("mosaic.retrieval needs mosaic.rankings, a folder of files written by amltrain data rank")


class Ranked(NamedTuple):
    """Images ranked for one sentence or image, best first: image ids [K] int64, similarities [K] float32."""

    images: NDArray[np.int64]
    scores: NDArray[np.float32]


class Ranking:
    """A ranking file: for every key (a sent_id or an image_id) images with their similarities, best first."""

    def __init__(self, path: Path) -> None:
        """path: a Parquet file with columns key, image_ids, scores. Raises UserError if it cannot be read."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            table = pq.read_table(path, columns=["key", "image_ids", "scores"]).combine_chunks()
        except (OSError, pa.ArrowException) as error:
            raise UserError(f"ranking {path} cannot be read ({error}); write it with amltrain data rank") from error
        order = np.argsort(np.asarray(table.column("key"), np.int64), kind="stable")
        self._keys = np.asarray(table.column("key"), np.int64)[order]
        self._order = order
        lists = table.column("image_ids").combine_chunks()
        self._offsets = np.asarray(lists.offsets, np.int64)
        self._images = np.asarray(lists.values, np.int64)
        self._scores = np.asarray(table.column("scores").combine_chunks().values, np.float32)

    def __getitem__(self, key: int) -> Ranked:
        """Images ranked for a key; empty for a key that the file does not have."""
        place = int(np.searchsorted(self._keys, key))
        if place == len(self._keys) or self._keys[place] != key:
            return Ranked(np.empty(0, np.int64), np.empty(0, np.float32))
        row = int(self._order[place])
        span = slice(int(self._offsets[row]), int(self._offsets[row + 1]))
        return Ranked(self._images[span], self._scores[span])


def ranking_path(folder: str | Path, dataset: str, split: str, kind: str) -> Path:
    """Path of a ranking file. kind: sentences (images for each sentence) or images (images for each image)."""
    return Path(folder) / f"{dataset}-{split}-{kind}.parquet"


class Mosaic:
    """The augmentation. Ranking files are read when their data set is first met."""

    def __init__(self, options: MosaicOptions) -> None:
        """Raises UserError for options out of range."""
        self.options = options
        options.check()
        self._rankings: dict[Path, Ranking] = {}
        self._told: set[str] = set()

    def __call__(self, sample: RawSample, draw: "Draw", dataset: RawDataset) -> RawSample:
        """Make a share of samples a mosaic: image [S, S] with the sample's image in one cell, mask 0 in the others."""
        options = self.options
        rng = random_generator("mosaic", dataset.seed, draw)
        if rng.random() >= options.probability:
            return sample
        cells = int(options.grids[rng.integers(len(options.grids))])
        retrieve = draw.epoch >= options.retrieval_epoch and rng.random() < options.retrieval
        companions = self._companions(sample, cells - 1, retrieve, rng, dataset)
        own = self._cell(sample.sentence, cells, rng)
        pictures = [dataset.referent_picture(referent) for referent in companions]
        pictures.insert(own, sample.image)
        canvas = compose(pictures, own, dataset.input_size, options.blur)
        return sample.moved(canvas, partial(in_cell, own=own, count=len(pictures), size=dataset.input_size))

    def _cell(self, sentence: str, cells: int, rng: np.random.Generator) -> int:
        """Choose the cell of the sample's image."""
        allowed = allowed_cells(sentence) if self.options.words_choose_cell and cells == 4 else list(range(cells))
        return int(allowed[rng.integers(len(allowed))])

    def _companions(
        self, sample: RawSample, count: int, retrieve: bool, rng: np.random.Generator, dataset: RawDataset
    ) -> list[int]:
        """Choose `count` referents of other images."""
        chosen = self._retrieved(sample, count, rng, dataset) if retrieve else []
        images = dataset.referent_images
        taken = {sample.ids.image_id, *(int(images[referent]) for referent in chosen)}
        for _ in range(100 * count):
            if len(chosen) == count:
                return chosen
            referent = int(rng.integers(len(images)))
            if int(images[referent]) not in taken:
                taken.add(int(images[referent]))
                chosen.append(referent)
        others = np.flatnonzero(~np.isin(images, list(taken)))  # few images: look for what is left
        _, first = np.unique(images[others], return_index=True)
        chosen += others[first][rng.permutation(len(first))][: count - len(chosen)].tolist()
        if len(chosen) < count:
            raise UserError(
                f"a mosaic of {count + 1} cells needs {count + 1} training images, and there are "
                f"{len(np.unique(images))}; set mosaic.grids to smaller ones, or remove mosaic from data.augment"
            )
        return chosen

    def _retrieved(self, sample: RawSample, count: int, rng: np.random.Generator, dataset: RawDataset) -> list[int]:
        """Choose up to `count` referents by the ranking for the sample's sentence."""
        candidates = self.candidates(sample, dataset)
        if len(candidates) < count and sample.ids.dataset not in self._told:
            self._told.add(sample.ids.dataset)
            logger.warning(
                "%s: a sentence has %d ranked companions, %d are needed; random ones fill up (logged once)",
                sample.ids.dataset, len(candidates), count,
            )  # fmt: skip
        return rng.permutation(candidates)[:count].tolist()

    def candidates(self, sample: RawSample, dataset: RawDataset) -> NDArray[np.int64]:
        """Referents of the images that a mosaic of this sample may be retrieved from, best first, at most `top_k`."""
        options, ids = self.options, sample.ids
        images, scores = self._ranking(ids.dataset, ids.split, "sentences")[ids.sent_id]
        kept = images != ids.image_id
        images, scores = images[kept], scores[kept]
        banned = np.zeros(len(images), bool)
        if options.max_text_similarity is not None:
            banned |= scores > options.max_text_similarity
        if options.max_image_similarity is not None:
            near = self._ranking(ids.dataset, ids.split, "images")[ids.image_id]
            banned |= np.isin(images, near.images[near.scores > options.max_image_similarity])
        images = images[-TAIL:] if len(images) and banned.all() else images[~banned]
        known, first = dataset.first_referents(ids.dataset)
        place = np.searchsorted(known, images).clip(max=len(known) - 1)
        return first[place[known[place] == images]][: options.top_k]

    def _ranking(self, dataset: str, split: str, kind: str) -> Ranking:
        assert self.options.rankings is not None
        path = ranking_path(self.options.rankings, dataset, split, kind)
        if path not in self._rankings:
            self._rankings[path] = Ranking(path)
        return self._rankings[path]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_rankings": {}}


@register_augmentation(options=MosaicOptions)
def mosaic(options: MosaicOptions) -> Augmentation:
    """Build NeMo's mosaic."""
    return Mosaic(options)


def allowed_cells(sentence: str) -> list[int]:
    """Return the cells of a 2 x 2 grid that the location words allow; all if there are none or they conflict."""
    allowed = {0, 1, 2, 3}
    for word in re.findall(r"[a-z]+", sentence.lower()):
        allowed &= _CELLS.get(word, allowed)
    return sorted(allowed) or [0, 1, 2, 3]


def cell_box(number: int, count: int, size: int) -> tuple[int, int, int, int]:
    """Top, bottom, left, right of one of `count` cells, numbered row by row, of a square canvas of `size` pixels."""
    side = round(count**0.5)
    edges = [round(i * size / side) for i in range(side + 1)]
    row, column = divmod(number, side)
    return edges[row], edges[row + 1], edges[column], edges[column + 1]


def compose(pictures: list[Image.Image], own: int, size: int, blur: float = 0.0) -> Image.Image:
    """Lay pictures out in a square grid, row by row, each stretched to its cell.

    pictures: RGB, a square number of them. size: side of the canvas, pixels. blur: Gaussian radius of all but number
    `own`.
    """
    canvas = Image.new("RGB", (size, size))
    for number, picture in enumerate(pictures):
        top, bottom, left, right = cell_box(number, len(pictures), size)
        cell = picture.resize((right - left, bottom - top), Image.Resampling.BILINEAR)
        if number != own and blur:
            cell = cell.filter(ImageFilter.GaussianBlur(blur))
        canvas.paste(cell, (left, top))
    return canvas


def in_cell(pixels: NDArray[np.uint8], own: int, count: int, size: int) -> NDArray[np.uint8]:
    """A map [h, w] of picture `own` as the canvas shows it, [size, size]; 0 in the other cells."""
    top, bottom, left, right = cell_box(own, count, size)
    canvas = np.zeros((size, size), np.uint8)
    canvas[top:bottom, left:right] = np.asarray(
        Image.fromarray(pixels).resize((right - left, bottom - top), Image.Resampling.NEAREST)
    )
    return canvas
