"""Map prepared rows to samples: a map-style dataset over memory-mapped rows.

index -> row, referent, sentence -> RawSample -> augmentations -> transform and tokenizer -> Sample
"""

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Sequence
from collections.abc import Set as AbstractSet
from functools import cached_property
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow.compute as pc
import torch
import torch.utils.data
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from amltrain.data.augment import BACKGROUND, OTHER, REFERENT, About, Augmentation, RawObjects, RawSample, SampleIds
from amltrain.data.boxes import annotated_corners, network_box, parts_of, without_box
from amltrain.data.cache import PresizedImages
from amltrain.data.conversations import ConversationWriter
from amltrain.data.images import Decoder, decode_image
from amltrain.data.rows import Rows
from amltrain.data.segmentation import MaskParts, choose_rle, decode_mask
from amltrain.data.text import SentenceTokenizer
from amltrain.data.transforms import ImageTransform, Transformed, View
from amltrain.errors import UserError
from amltrain.randomness import random_key
from amltrain.records import Draw, Sample

TrainUnit = Literal["referent", "sentence"]
RECENT_IMAGES = 4
"""Transformed images that a reader keeps: an evaluation reads the sentences of one image one after the other."""


class OpenSplit(NamedTuple):
    """One split of one data set: names, rows, and the presized images where there are any.

    metrics: further metrics that its papers report, see `DatasetSpec.metrics`. fingerprint: of its contents, see
    `catalog.fingerprint`. box_only: see `DatasetSpec.box_only`.
    """

    dataset: str
    split: str
    rows: Rows
    presized: PresizedImages | None = None
    metrics: tuple[str, ...] = ()
    fingerprint: str = ""
    box_only: bool = False


class SampleInfo(NamedTuple):
    """Where a sample comes from, and its sentence."""

    dataset: str
    split: str
    image_id: int
    ref_id: int
    sent_id: int
    sentence: str


class Annotation(NamedTuple):
    """What the annotations tell of a referent.

    category      its class; empty where the data do not name it
    same_class    other objects of that class in the image that this split refers to; -1 without a category
    height, width of the image, pixels
    """

    category: str
    same_class: int
    height: int
    width: int


class _Index(NamedTuple):
    """One entry per referent, all [N] int64: split, row in the split, referent in the row, number of its sentences."""

    split: NDArray[np.int64]
    row: NDArray[np.int64]
    referent: NDArray[np.int64]
    sentences: NDArray[np.int64]


def _index_split(number: int, opened: OpenSplit, excluded_images: AbstractSet[int]) -> _Index:
    """Index one split from its small columns; no image is read."""
    referents = opened.rows.columns.column("referents").combine_chunks()
    per_row = np.asarray(pc.list_value_length(referents), dtype=np.int64)
    sentences = np.asarray(pc.list_value_length(pc.struct_field(pc.list_flatten(referents), "sentences")), np.int64)
    row = np.repeat(np.arange(len(per_row)), per_row)
    referent = np.arange(len(row)) - np.repeat(np.cumsum(per_row) - per_row, per_row)
    index = _Index(np.full(len(row), number), row, referent, sentences)
    if excluded_images:
        images = np.asarray(opened.rows.columns.column("image_id"))
        kept = ~np.isin(images, np.fromiter(excluded_images, np.int64, len(excluded_images)))[row]
        index = _Index(*(column[kept] for column in index))
    return index


class ReferDataset(torch.utils.data.Dataset[Sample]):
    """Samples of one or several prepared splits.

    `dataset[Draw(epoch, index)]` or `dataset[index]` (epoch 0) -> Sample. With unit "referent" an index is a referent
    and its sentence is a function of the seed and the draw; with unit "sentence" an index is a sentence.
    """

    def __init__(
        self,
        splits: Sequence[OpenSplit],
        transform: ImageTransform,
        tokenizer: SentenceTokenizer,
        *,
        unit: TrainUnit = "sentence",
        sentence_field: Literal["sent", "raw"] = "sent",
        mask_parts: MaskParts = "union",
        seed: int = 0,
        excluded_images: AbstractSet[int] = frozenset(),
        first_sentence_only: bool = False,
        keep_original_target: bool = False,
        shuffle_sentences: bool = False,
        max_samples: int | None = None,
        perturb: Callable[[Image.Image, int], Image.Image] | None = None,
        augmentations: Sequence[Augmentation] = (),
        decoder: Decoder = "pil",
        regions: bool = False,
        boxes: bool = False,
        instances: bool = False,
        view: View | None = None,
        talk: ConversationWriter | None = None,
    ) -> None:
        """Index the splits.

        excluded_images: ids of images to leave out (the leak filter).
        keep_original_target: add the mask at the image's own size.
        shuffle_sentences: give every sample the sentence of another referent, by a permutation fixed by the seed.
        max_samples: keep only the first samples.
        perturb: changes every image, given with its sample id, before the transform (a robustness test).
        augmentations: change the raw sample before transform and tokenizer (training), in order.
        decoder: see `decode_image`; with torchvision, square images are resized by torch: at most one grey level apart.
        regions: add what every pixel shows, see `Batch.regions`. boxes: add the referent's box, see `Batch.box`.
        instances: add the objects of a sentence that means several, see `Batch.instances`.
        view: add a second picture, see `Batch.view`. talk: writes the conversations of a batch.

        Presized images of a split are used unless the images are perturbed or augmented.
        """
        self.splits, self.transform, self.tokenizer = list(splits), transform, tokenizer
        self.unit, self.sentence_field, self.mask_parts, self.seed = unit, sentence_field, mask_parts, seed
        self.keep_original_target, self.perturb = keep_original_target, perturb
        self.augmentations, self.decoder, self.regions = list(augmentations), decoder, regions
        self.view, self.talk, self.boxes, self.instances = view, talk, boxes, instances
        self._recent: OrderedDict[tuple[int, int], tuple[Tensor, Tensor]] = OrderedDict()
        indices = [_index_split(number, opened, excluded_images) for number, opened in enumerate(self.splits)]
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
    def split_sizes(self) -> list[int]:
        """Return the number of samples of every split, in order."""
        return np.bincount(self.index.split[self.referent_of[: self.length]], minlength=len(self.splits)).tolist()

    @property
    def paper_metrics(self) -> tuple[str, ...]:
        """Further metrics that the papers of its data sets report."""
        return tuple(dict.fromkeys(name for opened in self.splits for name in opened.metrics))

    @property
    def box_only(self) -> bool:
        """Whether the truth of some split is boxes."""
        return any(opened.box_only for opened in self.splits)

    @cached_property
    def fingerprint(self) -> str:
        """What identifies the samples: contents of the splits, and which of them are used; "" where unknown."""
        if not all(opened.fingerprint for opened in self.splits):
            return ""
        digest = hashlib.sha256("\n".join(opened.fingerprint for opened in self.splits).encode())
        for column in (*self.index, self.referent_of[: self.length], self.sentence_of[: self.length]):
            digest.update(np.ascontiguousarray(column, np.int64).tobytes())
        return digest.hexdigest()

    def row_groups(self) -> np.ndarray | None:
        """Return the row group of every sample, [samples] int64; None if every one can be read alone."""
        entries = self.referent_of[: self.length]
        number, row = self.index.split[entries], self.index.row[entries]
        groups = np.empty(len(entries), np.int64)
        for i, opened in enumerate(self.splits):
            if opened.rows.row_group is None:
                return None
            groups[number == i] = (i << 32) + opened.rows.row_group[row[number == i]]
        return np.unique(groups, return_inverse=True)[1]

    def counts(self) -> dict[str, int]:
        """Images, refs and expressions in use, and samples per epoch."""
        used = np.unique(self.referent_of[: self.length])
        pairs = np.unique(np.stack([self.index.split[used], self.referent_images[used]]), axis=1)
        return {
            "images": pairs.shape[1],
            "refs": len(used),
            "expressions": int(self.index.sentences[used].sum()) if self.unit == "referent" else self.length,
            "samples": self.length,
        }

    def describe(self) -> dict[str, Any]:
        """Settings that a score depends on besides the model and the metric."""
        return {
            "resize": self.transform.resize,
            "normalization": self.transform.normalization,
            "max_tokens": self.tokenizer.max_tokens,
            "sentence_field": self.sentence_field,
            "mask_parts": self.mask_parts,
            "decoder": self.decoder,
            "shuffled_sentences": self.text_of is not None,
        }

    def box_origin(self) -> str:
        """Say where the boxes of `Batch.box` come from; "" where the model asks for none."""
        if not self.boxes:
            return ""
        missing = sum(
            without_box(pc.list_flatten(opened.rows.columns.column("referents").combine_chunks()))
            for opened in self.splits
        )
        notes = [f"for {missing:,} refs without one"] * bool(missing)
        notes += ["where an augmentation replaces the mask"] * bool(self.augmentations)
        return "annotated" + (f"; around the mask {' and '.join(notes)}" if notes else "")

    def instance_origin(self) -> str:
        """Say how many sentences that mean several objects have them one by one; "" where the model does not ask."""
        if not self.instances:
            return ""
        several = apart = 0
        for opened in self.splits:
            for referents in opened.rows.columns.column("referents").to_pylist():
                for referent in referents:
                    if len(referent["ann_ids"]) > 1:
                        several, apart = several + 1, apart + bool(parts_of(referent, referents))
        if not several:
            return "every referent is one object"
        whole = f"; {several - apart:,} are taken as one, their objects are not annotated alone" * (apart < several)
        return f"one by one for {apart:,} of {several:,} referents with several objects{whole}"

    def __getitem__(self, draw: Draw | int) -> Sample:
        draw = draw if isinstance(draw, Draw) else Draw(0, int(draw))
        index = draw.index
        key = random_key(self.seed, draw.epoch, index, *([draw.repeat] if draw.repeat else []))
        referent = self._referent(index)
        text, no_target = self._sentence(index, referent, key)[self.sentence_field], referent["no_target"]
        view = None
        if self.augmentations:
            mask: NDArray[np.uint8] | None
            raw = self._augmented(draw, referent, key)
            no_target, regions, corners, parts = raw.no_target, raw.regions, raw.corners, raw.instances
            view, frame = (None, None) if self.view is None else self.view(raw.image)
            (image, target, geometry), mask, text = self.transform(raw.image, raw.mask), raw.mask, raw.sentence
        else:
            mask = self._mask(index, referent) if self._needs_mask(index) else None
            image, target, geometry = self._network_input(index, mask)
            regions = self._regions(index) if self.regions else None
            corners = annotated_corners(referent) if self.boxes else None
            parts = self._instances(index, referent)
            view, frame = (None, None) if self.view is None else self.view(self.picture(index))
        input_ids, text_mask = self.tokenizer(text)
        assert target is not None
        original = torch.from_numpy(mask * np.uint8(255)) if self.keep_original_target and mask is not None else None
        return Sample(
            image,
            input_ids,
            text_mask,
            target,
            torch.tensor(no_target),
            torch.tensor(index),
            torch.tensor(key),
            geometry,
            original,
            None if regions is None else self._network_regions(regions),
            view,
            text,
            self._picture_number(index),
            network_box(corners, target, geometry) if self.boxes else None,
            frame,
            tuple(self.transform.target(part) for part in parts),
        )

    def raw(self, draw: Draw | int) -> RawSample:
        """Raw sample of a draw, before any augmentation."""
        draw = draw if isinstance(draw, Draw) else Draw(0, int(draw))
        key = random_key(self.seed, draw.epoch, draw.index, *([draw.repeat] if draw.repeat else []))
        return self._raw(draw.index, self._referent(draw.index), key)

    def info(self, sample_id: int) -> SampleInfo:
        """Return the source of a sample. With unit "referent" the sentence is the one of epoch 0."""
        referent = self._referent(sample_id)
        sentence = self._sentence(sample_id, referent, random_key(self.seed, 0, sample_id))
        return SampleInfo(*self._ids(sample_id, referent, sentence), sentence[self.sentence_field])

    def picture(self, sample_id: int) -> Image.Image:
        """Decode the sample's image at its own size, RGB, perturbed where the dataset perturbs."""
        number, row, _ = self._place(sample_id)
        image = self._decode(number, row, "pil")
        assert isinstance(image, Image.Image)
        return image if self.perturb is None else self.perturb(image, sample_id)

    def image_groups(self) -> NDArray[np.int64]:
        """Return the image number of every sample, [samples] int64; perturbed images differ between samples."""
        if self.perturb is not None:
            return np.arange(self.length)
        return self.pictures()

    def pictures(self) -> NDArray[np.int64]:
        """Return the number of every sample's picture, [samples] int64."""
        entries = self.referent_of[: self.length]
        return (self.index.split[entries] << 32) + self.index.row[entries]

    def _picture_number(self, index: int) -> int:
        number, row, _ = self._place(index)
        return (number << 32) + row

    def about(self, sample_id: int) -> About:
        """Return what the annotations say of a sample's referent and its picture."""
        number, row, place = self._place(sample_id)
        columns = self.splits[number].rows.columns
        referents = columns.column("referents")[row].as_py()
        texts = [[sentence[self.sentence_field] for sentence in referent["sentences"]] for referent in referents]
        own = referents[place]
        return About(
            columns.column("image_id")[row].as_py(),
            own["category"] or "",
            own["no_target"],
            texts[place],
            [text for several in texts for text in several],
            {referent["category"] or "" for referent in referents},
        )

    def annotation(self, sample_id: int) -> Annotation:
        """Return the annotations of a sample's referent."""
        number, row, place = self._place(sample_id)
        referents = self.splits[number].rows.columns.column("referents")[row].as_py()
        category, own = referents[place]["category"], set(referents[place]["ann_ids"])
        others = {tuple(r["ann_ids"]) for r in referents if r["category"] == category and not own & set(r["ann_ids"])}
        height, width = self._row_size(number, row)
        return Annotation(category or "", len(others) if category else -1, height, width)

    @property
    def input_size(self) -> int:
        """Side of the network input, pixels."""
        return self.transform.size

    @cached_property
    def referent_images(self) -> NDArray[np.int64]:
        """Image id of every referent in use, [referents] int64."""
        ids = [np.asarray(opened.rows.columns.column("image_id"), np.int64) for opened in self.splits]
        first = np.cumsum([0, *(len(column) for column in ids)])
        return np.concatenate(ids)[first[self.index.split] + self.index.row]

    def picture_sentences(self, referent: int) -> list[str]:
        """Sentences of all referents of one referent's picture."""
        rows = self.splits[int(self.index.split[referent])].rows
        referents = rows.columns.column("referents")[int(self.index.row[referent])].as_py()
        return [sentence[self.sentence_field] for one in referents for sentence in one["sentences"]]

    def referent_picture(self, referent: int) -> Image.Image:
        """Decode the image of one referent, RGB."""
        image = self._decode(int(self.index.split[referent]), int(self.index.row[referent]), "pil")
        assert isinstance(image, Image.Image)
        return image

    def first_referents(self, dataset: str) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Image ids of one data set in use, sorted, and the first referent of each."""
        if dataset not in self._first_referents:
            numbers = [number for number, opened in enumerate(self.splits) if opened.dataset == dataset]
            entries = np.flatnonzero(np.isin(self.index.split, numbers))
            images, first = np.unique(self.referent_images[entries], return_index=True)
            self._first_referents[dataset] = (images, entries[first])
        return self._first_referents[dataset]

    @cached_property
    def _first_referents(self) -> dict[str, tuple[NDArray[np.int64], NDArray[np.int64]]]:
        return {}

    def _augmented(self, draw: Draw, referent: dict[str, Any], key: int) -> RawSample:
        sample = self._raw(draw.index, referent, key)
        for augmentation in self.augmentations:
            sample = augmentation(sample, draw, self)
        return sample

    def _raw(self, index: int, referent: dict[str, Any], key: int) -> RawSample:
        sentence = self._sentence(index, referent, key)
        ids = self._ids(index, referent, sentence)
        mask, text = self._mask(index, referent), sentence[self.sentence_field]
        regions = self._regions(index) if self.regions else None
        corners, parts = annotated_corners(referent) if self.boxes else None, self._instances(index, referent)
        objects = RawObjects(mask, corners, parts) if corners or parts else None
        return RawSample(self.picture(index), mask, text, ids, referent["no_target"], regions, objects)

    def _instances(self, index: int, referent: dict[str, Any]) -> tuple[NDArray[np.uint8], ...]:
        """Masks of a referent's objects one by one, where the model asks and there are several; else ()."""
        if not self.instances or len(referent["ann_ids"]) < 2:
            return ()
        number, row, _ = self._place(index)
        referents = self.splits[number].rows.columns.column("referents")[row].as_py()
        return tuple(self._mask(index, part) for part in parts_of(referent, referents))

    def other_masks(self, sample_id: int) -> list[NDArray[np.uint8]]:
        """Masks [h, w] uint8 of the other referents of a sample's picture; those of its own objects are left out."""
        number, row, place = self._place(sample_id)
        referents = self.splits[number].rows.columns.column("referents")[row].as_py()
        own = set(referents[place]["ann_ids"])
        others = [r for r in referents if not r["no_target"] and not own & set(r["ann_ids"])]
        return [self._mask(sample_id, referent) for referent in others]

    def _regions(self, index: int) -> NDArray[np.uint8]:
        """`RawSample.regions` before any augmentation."""
        own = self._mask(index, self._referent(index))
        others = self.other_masks(index)
        covered = np.any(others, axis=0) if others else np.zeros(own.shape, bool)
        return np.where(own > 0, np.uint8(REFERENT), np.where(covered, np.uint8(OTHER), np.uint8(BACKGROUND)))

    def _network_regions(self, regions: NDArray[np.uint8]) -> Tensor:
        """Regions [h, w] as the network sees them, [H, W] uint8; where the transform mixes two, the referent wins."""
        own, covered = (self.transform.target((regions >= least).astype(np.uint8)) for least in (REFERENT, OTHER))
        return torch.where(own >= 128, REFERENT, torch.where(covered >= 128, OTHER, BACKGROUND)).to(torch.uint8)

    def _ids(self, index: int, referent: dict[str, Any], sentence: dict[str, Any]) -> SampleIds:
        number, row, _ = self._place(index)
        opened = self.splits[number]
        image_id = opened.rows.columns.column("image_id")[row].as_py()
        return SampleIds(opened.dataset, opened.split, image_id, referent["ref_id"], sentence["sent_id"])

    def _presized(self, number: int) -> PresizedImages | None:
        return self.splits[number].presized if self.perturb is None else None

    def _needs_mask(self, index: int) -> bool:
        """Whether a sample's mask at its image's own size is read; presized targets do not need it."""
        return self.keep_original_target or self._presized(self._place(index)[0]) is None

    def _network_input(self, index: int, mask: NDArray[np.uint8] | None) -> Transformed:
        """Image, target and geometry of a sample that no augmentation changes. An image is transformed once for all
        its sentences in a row.
        """
        number, row, referent = self._place(index)
        presized = self._presized(number)
        if presized is not None:
            geometry = self.transform.geometry(*self._row_size(number, row))
            return Transformed(presized.image(row), presized.target(row, referent), geometry)
        assert mask is not None
        if self.perturb is not None:  # of the sample, not of the image
            return self.transform(self.picture(index), mask)
        recent = self._recent.pop((number, row), None)
        if recent is None:
            image, _, geometry = self.transform(self._decode(number, row, self.decoder))
            recent = (image, geometry)
        self._recent[number, row] = recent
        if len(self._recent) > RECENT_IMAGES:
            self._recent.popitem(last=False)
        return Transformed(recent[0], self.transform.target(mask), recent[1])

    def _decode(self, number: int, row: int, decoder: Decoder) -> Image.Image | Tensor:
        opened = self.splits[number]
        name = f"image {opened.rows.columns.column('file_name')[row]} (row {row}) of {opened.dataset}/{opened.split}"
        return decode_image(opened.rows.image_bytes(row), name, self._row_size(number, row), decoder)

    def _row_size(self, number: int, row: int) -> tuple[int, int]:
        """Height and width of a row's image, pixels."""
        columns = self.splits[number].rows.columns
        return columns.column("height")[row].as_py(), columns.column("width")[row].as_py()

    def _place(self, index: int) -> tuple[int, int, int]:
        """Return the split's number, the row in the split, and the referent in the row."""
        entry = self.referent_of[index]
        return int(self.index.split[entry]), int(self.index.row[entry]), int(self.index.referent[entry])

    def _referent(self, index: int) -> dict[str, Any]:
        number, row, referent = self._place(index)
        return self.splits[number].rows.columns.column("referents")[row][referent].as_py()

    def _sentence(self, index: int, referent: dict[str, Any], key: int) -> dict[str, Any]:
        if self.text_of is not None:
            index = int(self.text_of[index])
            referent = self._referent(index)
        sentences = referent["sentences"]
        if self.unit == "referent":
            return sentences[random_key(key, 1) % len(sentences)]
        return sentences[self.sentence_of[index]]

    def _rle(self, referent: dict[str, Any]) -> dict[str, Any]:
        return choose_rle(referent, self.mask_parts)

    def _mask(self, index: int, referent: dict[str, Any]) -> NDArray[np.uint8]:
        """Decode a referent's mask, [h, w] uint8; prepared data may come from strangers, so it is checked first."""
        number, row, _ = self._place(index)
        rle, opened = self._rle(referent), self.splits[number]
        try:
            if tuple(rle["size"]) != self._row_size(number, row):
                raise UserError(f"the mask is for {rle['size']}, the image {list(self._row_size(number, row))}")
            return decode_mask(rle)
        except UserError as error:
            place = f"ref {referent['ref_id']} of {opened.dataset}/{opened.split}"
            raise UserError(f"{place}: {error}; remove the prepared folder and prepare it again") from error

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_recent": OrderedDict()}


def read_sentences(rows: Rows, sentence_field: str) -> list[str]:
    """Read every sentence of every referent, in order; no image is read."""
    referents = pc.list_flatten(rows.columns.column("referents").combine_chunks())
    entries = pc.list_flatten(pc.struct_field(referents, "sentences"))
    return pc.struct_field(entries, sentence_field).to_pylist()


def _foreign_samples(referent_of: np.ndarray, seed: int) -> np.ndarray:
    """Choose for every sample a sample of another referent, as a permutation.

    Referents in random order, then a shift by the largest number of samples that a referent has. Raises UserError with
    fewer than two referents.
    """
    referents, sizes = np.unique(referent_of, return_counts=True)
    if len(referents) < 2:
        raise UserError("sentences cannot be shuffled between fewer than two referents")
    order = np.random.default_rng(seed).permutation(len(referents))
    by_referent = np.argsort(np.argsort(order)[np.searchsorted(referents, referent_of)], kind="stable")
    foreign = np.empty(len(referent_of), np.int64)
    foreign[by_referent] = np.roll(by_referent, -int(sizes.max()))
    return foreign
