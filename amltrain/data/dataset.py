"""Prepared rows -> Samples. Map-style over a memory-mapped table; an index says which row, referent and sentence."""

import io
from collections.abc import Callable, Sequence
from collections.abc import Set as AbstractSet
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow.compute as pc
import torch
import torch.utils.data
from PIL import Image

from amltrain.data.images import to_rgb
from amltrain.data.rows import Rows
from amltrain.data.segmentation import decode_rle
from amltrain.data.text import SentenceTokenizer
from amltrain.data.transforms import ImageTransform
from amltrain.errors import UserError
from amltrain.randomness import random_key
from amltrain.records import Draw, Sample

TrainUnit = Literal["referent", "sentence"]


class Part(NamedTuple):
    """One split of one data set: its name, and the rows."""

    dataset: str
    split: str
    rows: Rows


class SampleInfo(NamedTuple):
    """Where a sample comes from."""

    dataset: str
    split: str
    image_id: int
    ref_id: int
    sent_id: int
    sentence: str


class _Index(NamedTuple):
    """One entry a referent, all [N] int64: part, row in the part, referent in the row, its number of sentences."""

    part: np.ndarray
    row: np.ndarray
    referent: np.ndarray
    sentences: np.ndarray


def _index_part(number: int, part: Part, excluded_images: AbstractSet[int]) -> _Index:
    """Built from the small columns alone; no image is read."""
    referents = part.rows.columns.column("referents").combine_chunks()
    per_row = np.asarray(pc.list_value_length(referents), dtype=np.int64)
    sentences = np.asarray(pc.list_value_length(pc.struct_field(pc.list_flatten(referents), "sentences")), np.int64)
    row = np.repeat(np.arange(len(per_row)), per_row)
    referent = np.arange(len(row)) - np.repeat(np.cumsum(per_row) - per_row, per_row)
    index = _Index(np.full(len(row), number), row, referent, sentences)
    if excluded_images:
        images = np.asarray(part.rows.columns.column("image_id"))
        kept = ~np.isin(images, np.fromiter(excluded_images, np.int64, len(excluded_images)))[row]
        index = _Index(*(column[kept] for column in index))
    return index


class ReferDataset(torch.utils.data.Dataset):
    """Samples of one or several prepared splits.

    `dataset[Draw(epoch, index)]` or `dataset[index]` (epoch 0) -> Sample. With unit "referent" an index is a referent
    and its sentence is a function of the seed and the draw; with unit "sentence" an index is a sentence.
    """

    def __init__(
        self,
        parts: Sequence[Part],
        transform: ImageTransform,
        tokenizer: SentenceTokenizer,
        *,
        unit: TrainUnit = "sentence",
        sentence_field: Literal["sent", "raw"] = "sent",
        mask_parts: Literal["union", "exclusive"] = "union",
        seed: int = 0,
        excluded_images: AbstractSet[int] = frozenset(),
        first_sentence_only: bool = False,
        keep_original_target: bool = False,
        shuffle_sentences: bool = False,
        max_samples: int | None = None,
        perturb: Callable[[Image.Image, int], Image.Image] | None = None,
    ) -> None:
        """excluded_images: ids left out (the leak filter). keep_original_target: add the mask at the image's own size.

        perturb: changes every image, given with its sample id, before the transform (a robustness test).

        shuffle_sentences: give every sample the sentence of another referent, by a permutation fixed by the seed.
        """
        self.parts, self.transform, self.tokenizer = list(parts), transform, tokenizer
        self.unit, self.sentence_field, self.mask_parts, self.seed = unit, sentence_field, mask_parts, seed
        self.keep_original_target, self.perturb = keep_original_target, perturb
        indices = [_index_part(number, part, excluded_images) for number, part in enumerate(self.parts)]
        self.index = _Index(*(np.concatenate(columns) for columns in zip(*indices, strict=True)))
        taken = np.minimum(self.index.sentences, 1) if first_sentence_only else self.index.sentences
        if unit == "referent":
            self.referent_of = np.arange(len(taken))
            self.sentence_of = np.zeros(len(taken), np.int64)
        else:
            self.referent_of = np.repeat(np.arange(len(taken)), taken)
            self.sentence_of = np.arange(len(self.referent_of)) - np.repeat(np.cumsum(taken) - taken, taken)
        self.text_of = _foreign_samples(self.referent_of, seed) if shuffle_sentences else None
        self.length = min(len(self.referent_of), max_samples or len(self.referent_of))

    def __len__(self) -> int:
        return self.length

    @property
    def part_sizes(self) -> list[int]:
        """Samples of every part, in order."""
        return np.bincount(self.index.part[self.referent_of[: self.length]], minlength=len(self.parts)).tolist()

    def row_groups(self) -> np.ndarray | None:
        """Which samples are read together, [samples] int64; None if every one can be read alone."""
        entries = self.referent_of[: self.length]
        number, row = self.index.part[entries], self.index.row[entries]
        groups = np.empty(len(entries), np.int64)
        for i, part in enumerate(self.parts):
            if part.rows.row_group is None:
                return None
            groups[number == i] = (i << 32) + part.rows.row_group[row[number == i]]
        return np.unique(groups, return_inverse=True)[1]

    def counts(self) -> dict[str, int]:
        """Images, refs and expressions in use, and samples an epoch."""
        used = np.unique(self.referent_of[: self.length])
        part, row = self.index.part[used], self.index.row[used]
        return {
            "images": len({self._image_id(p, r) for p, r in set(zip(part.tolist(), row.tolist(), strict=True))}),
            "refs": len(used),
            "expressions": int(self.index.sentences[used].sum()) if self.unit == "referent" else self.length,
            "samples": self.length,
        }

    def describe(self) -> dict[str, Any]:
        """What a score depends on besides the model and the metric."""
        return {
            "resize": self.transform.resize,
            "normalization": self.transform.normalization,
            "max_tokens": self.tokenizer.max_tokens,
            "sentence_field": self.sentence_field,
            "mask_parts": self.mask_parts,
            "shuffled_sentences": self.text_of is not None,
        }

    def __getitem__(self, draw: Draw | int) -> Sample:
        epoch, index, repeat = draw if isinstance(draw, Draw) else Draw(0, int(draw))
        key = random_key(self.seed, epoch, index, *([repeat] if repeat else []))
        referent = self._referent(index)
        mask = decode_rle(self._rle(referent))
        image, target, geometry = self.transform(self.picture(index), mask)
        input_ids, text_mask = self.tokenizer(self._sentence(index, referent, key)[self.sentence_field])
        assert target is not None
        return Sample(
            image,
            input_ids,
            text_mask,
            target,
            torch.tensor(referent["no_target"]),
            torch.tensor(index),
            torch.tensor(key),
            geometry,
            torch.from_numpy(mask * np.uint8(255)) if self.keep_original_target else None,
        )

    def info(self, sample_id: int) -> SampleInfo:
        """Where a sample comes from. With unit "referent" the sentence is the one of epoch 0."""
        referent = self._referent(sample_id)
        sentence = self._sentence(sample_id, referent, random_key(self.seed, 0, sample_id))
        part, row, _ = self._place(sample_id)
        return SampleInfo(
            part.dataset,
            part.split,
            part.rows.columns.column("image_id")[row].as_py(),
            referent["ref_id"],
            sentence["sent_id"],
            sentence[self.sentence_field],
        )

    def picture(self, sample_id: int) -> Image.Image:
        """The sample's image at its own size, RGB, as the transform gets it."""
        part, row, _ = self._place(sample_id)
        name = f"image {part.rows.columns.column('file_name')[row]} (row {row}) of {part.dataset}/{part.split}"
        try:
            image = to_rgb(Image.open(io.BytesIO(part.rows.image_bytes(row))), name)
        except (OSError, SyntaxError, TypeError) as error:
            raise UserError(
                f"{name} cannot be decoded ({error}); remove the prepared folder and prepare it again"
            ) from error
        return image if self.perturb is None else self.perturb(image, sample_id)

    def _place(self, index: int) -> tuple[Part, int, int]:
        """Part, row in the part, referent in the row."""
        entry = self.referent_of[index]
        part, row, referent = (int(column[entry]) for column in self.index[:3])
        return self.parts[part], row, referent

    def _referent(self, index: int) -> dict[str, Any]:
        part, row, referent = self._place(index)
        return part.rows.columns.column("referents")[row][referent].as_py()

    def _sentence(self, index: int, referent: dict[str, Any], key: int) -> dict[str, Any]:
        if self.text_of is not None:
            index = int(self.text_of[index])
            referent = self._referent(index)
        sentences = referent["sentences"]
        if self.unit == "referent":
            return sentences[random_key(key, 1) % len(sentences)]
        return sentences[self.sentence_of[index]]

    def _rle(self, referent: dict[str, Any]) -> dict[str, Any]:
        exclusive = referent["mask_exclusive"]
        if self.mask_parts == "exclusive" and exclusive is not None and exclusive["counts"] is not None:
            return exclusive
        return referent["mask"]

    def _image_id(self, part: int, row: int) -> int:
        return self.parts[part].rows.columns.column("image_id")[row].as_py()


def read_sentences(rows: Rows, sentence_field: str) -> list[str]:
    """Every sentence of every referent, in order; no image is read."""
    referents = pc.list_flatten(rows.columns.column("referents").combine_chunks())
    entries = pc.list_flatten(pc.struct_field(referents, "sentences"))
    return pc.struct_field(entries, sentence_field).to_pylist()


def _foreign_samples(referent_of: np.ndarray, seed: int) -> np.ndarray:
    """For every sample another referent's sample, a permutation: referents in random order, then a shift by the largest
    number of samples that a referent has. With fewer than two referents there is nothing to swap."""
    referents, sizes = np.unique(referent_of, return_counts=True)
    if len(referents) < 2:
        raise UserError("sentences cannot be shuffled between fewer than two referents")
    order = np.random.default_rng(seed).permutation(len(referents))
    by_referent = np.argsort(np.argsort(order)[np.searchsorted(referents, referent_of)], kind="stable")
    foreign = np.empty(len(referent_of), np.int64)
    foreign[by_referent] = np.roll(by_referent, -int(sizes.max()))
    return foreign
