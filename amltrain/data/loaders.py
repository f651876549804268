"""Collate samples into a batch.

Build data sets, samplers and loaders from a run's config.
"""

import multiprocessing
import signal
import sys
from collections.abc import Callable, Sequence
from collections.abc import Set as AbstractSet
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch.utils.data import BatchSampler, DataLoader

from amltrain.config.schema import DataConfig, EvaluationConfig, MaskParts, Preprocess, Protocol
from amltrain.data.augment import Augmentation
from amltrain.data.cache import PresizedImages, open_presized
from amltrain.data.catalog import find_spec, fingerprint, read_manifest
from amltrain.data.conversations import ConversationWriter, Kind, add_tokens, words_of
from amltrain.data.dataset import OpenSplit, ReferDataset, read_sentences
from amltrain.data.leakage import excluded_images
from amltrain.data.rows import open_rows
from amltrain.data.sampler import EpochSampler
from amltrain.data.text import TRAIN_WORDPIECE, SentenceTokenizer
from amltrain.data.transforms import ImageTransform, View
from amltrain.errors import SIGNALS, UserError, signals_held
from amltrain.records import Batch, Sample


def collate(samples: Sequence[Sample], talk: ConversationWriter | None = None) -> Batch:
    """Stack samples into a batch; images stay uint8, and masks at the images' own sizes a tuple, as sizes differ.

    talk: writes what a language model reads.
    """
    regions = [sample.regions for sample in samples if sample.regions is not None]
    views = [sample.view for sample in samples if sample.view is not None]
    frames = [sample.view_geometry for sample in samples if sample.view_geometry is not None]
    boxes = [sample.box for sample in samples if sample.box is not None]
    return Batch(
        image=torch.stack([sample.image for sample in samples]),
        input_ids=torch.stack([sample.input_ids for sample in samples]),
        text_mask=torch.stack([sample.text_mask for sample in samples]),
        target=torch.stack([sample.target for sample in samples]),
        no_target=torch.stack([sample.no_target for sample in samples]),
        sample_id=torch.stack([sample.sample_id for sample in samples]),
        random_key=torch.stack([sample.random_key for sample in samples]),
        geometry=torch.stack([sample.geometry for sample in samples]),
        original_target=tuple(s.original_target for s in samples if s.original_target is not None),
        regions=torch.stack(regions) if regions else None,
        view=torch.stack(views) if views else None,
        conversation=None if talk is None else talk(samples),
        box=torch.stack(boxes) if boxes else None,
        view_geometry=torch.stack(frames) if frames else None,
        instances=_stacked_instances(samples),
    )


def _stacked_instances(samples: Sequence[Sample]) -> torch.Tensor | None:
    """`Batch.instances`; None where every sample means one object at most."""
    most = max((len(sample.instances) for sample in samples), default=0)
    if most == 0:
        return None
    rows = [sample.instances or (sample.target,) for sample in samples]
    stacked = torch.zeros(len(rows), most, *samples[0].target.shape, dtype=torch.uint8)
    for row, parts in zip(stacked, rows, strict=True):
        row[: len(parts)] = torch.stack(parts)
    return stacked


def build_transform(preprocess: Preprocess) -> ImageTransform:
    """Build the image transform of a complete preprocess."""
    assert preprocess.size and preprocess.resize and preprocess.normalization
    return ImageTransform(preprocess.size, preprocess.resize, preprocess.normalization)


def build_view(preprocess: Preprocess) -> View | None:
    """Build what makes the second picture of a complete preprocess; None where the model makes its own."""
    return View(preprocess.view_size, preprocess.view) if preprocess.view_size else None


def build_writer(
    preprocess: Preprocess, tokenizer: SentenceTokenizer, kind: Kind, sentences: int = 1
) -> ConversationWriter | None:
    """Build what writes the conversations of a complete preprocess; None for a model that reads sentences alone.

    tokenizer: the model's own, with the tokens of `add_tokens`. Raises UserError where it has lost them.
    """
    if not preprocess.conversation:
        return None
    return ConversationWriter(
        tokenizer,
        preprocess.conversation,
        kind,
        image_tokens=preprocess.image_tokens,
        longest=preprocess.conversation_tokens,
        sentences=sentences,
    )


def load_tokenizer(name: str, preprocess: Preprocess, fix: str = TRAIN_WORDPIECE) -> SentenceTokenizer:
    """Load a tokenizer for a model, with the tokens of its conversations. fix: advice where there is none."""
    if not preprocess.conversation:
        return SentenceTokenizer.load(name, preprocess.max_tokens, fix)
    tokenizer = SentenceTokenizer.load(name, preprocess.max_tokens, fix, legacy=True)  # as LLaVA's
    add_tokens(tokenizer, preprocess.conversation)
    return tokenizer


def build_tokenizer(data: DataConfig, preprocess: Preprocess) -> SentenceTokenizer:
    """Load the protocol's tokenizer; `wordpiece` is built from the training sentences."""
    assert preprocess.tokenizer and preprocess.max_tokens and preprocess.sentence_field
    if preprocess.tokenizer != "wordpiece":
        return load_tokenizer(preprocess.tokenizer, preprocess)
    splits = [_open_split(data, name, data.train_split) for name in data.datasets]
    sentences = (sentence for opened in splits for sentence in read_sentences(opened.rows, preprocess.sentence_field))
    if not preprocess.conversation:
        return SentenceTokenizer.train_wordpiece(sentences, preprocess.max_tokens)
    every = chain(words_of(preprocess.conversation), sentences)
    tokenizer = SentenceTokenizer.train_wordpiece(every, preprocess.max_tokens)
    add_tokens(tokenizer, preprocess.conversation)
    return tokenizer


def build_train_dataset(
    data: DataConfig,
    preprocess: Preprocess,
    tokenizer: SentenceTokenizer,
    *,
    mask_parts: MaskParts,
    seed: int,
    augmentations: Sequence[Augmentation] = (),
    max_samples: int | None = None,
    regions: bool = False,
    original: bool = False,
    boxes: bool = False,
    instances: bool = False,
) -> ReferDataset:
    """Build the training samples of all data sets, without the images that any of them evaluates on (data.leak_filter).

    mask_parts: data.mask_parts, or its default for null. augmentations: of `build_augmentations`. regions: whether the
    method reads `Batch.regions`. original: whether the loss reads masks at the pictures' own sizes. boxes: whether the
    model needs `Batch.box`. instances: the same of `Batch.instances`.
    """
    assert preprocess.sentence_field
    _check_weights(data)
    transform = build_transform(preprocess)
    view = build_view(preprocess)
    itself = augmentations or view is not None  # these need the images as they are
    sized = None if itself else (transform, mask_parts)
    splits = [_open_split(data, name, data.train_split, sized) for name in data.datasets]
    excluded = leaks(data) if len(data.datasets) > 1 or data.also_held_out or data.held_out_ids else frozenset()
    dataset = ReferDataset(
        splits,
        transform,
        tokenizer,
        unit=data.train_unit,
        sentence_field=preprocess.sentence_field,
        mask_parts=mask_parts,
        seed=seed,
        excluded_images=excluded,
        augmentations=augmentations,
        decoder=data.decoder,
        max_samples=max_samples,
        regions=regions,
        keep_original_target=original,
        boxes=boxes,
        instances=instances,
        view=view,
        talk=build_writer(preprocess, tokenizer, "train", data.sentences_per_image),
    )
    if max_samples is not None:
        return dataset
    empty = [opened.dataset for opened, size in zip(splits, dataset.split_sizes, strict=True) if size == 0]
    if empty:
        raise UserError(f"{', '.join(empty)}: no training sample is left; check data.train_split and leak_filter")
    return dataset


def leaks(data: DataConfig) -> AbstractSet[int]:
    """List the ids of the images that training must not see; none without the leak filter."""
    if not data.leak_filter:
        return frozenset()
    return excluded_images(
        data.prepared,
        data.datasets,
        also_held_out=data.also_held_out,
        held_out_ids=data.held_out_ids,
        streaming=data.streaming,
    )


def build_sampler(
    dataset: ReferDataset,
    data: DataConfig,
    *,
    seed: int,
    global_batch_size: int,
    total_steps: int,
    first_step: int = 0,
) -> EpochSampler:
    """Build the sampler of a training from `first_step` on."""
    return EpochSampler(
        dataset.split_sizes,
        seed=seed,
        global_batch_size=global_batch_size,
        total_steps=total_steps,
        first_step=first_step,
        weights=data.weights,
        row_groups=dataset.row_groups(),
        pictures=dataset.pictures(),
        together=data.sentences_per_image,
    )


def build_train_loader(
    dataset: ReferDataset,
    data: DataConfig,
    *,
    seed: int,
    global_batch_size: int,
    micro_batch_size: int,
    total_steps: int,
    first_step: int,
) -> DataLoader[Any]:
    """Build the loader of a whole run's micro-batches from `first_step` on; Accelerate deals them to the processes in
    turn. Images are uint8; see `prepare_batch`.
    """
    sampler = build_sampler(
        dataset,
        data,
        seed=seed,
        global_batch_size=global_batch_size,
        total_steps=total_steps,
        first_step=first_step,
    )
    batches = BatchSampler(sampler, micro_batch_size, drop_last=False)  # type: ignore[arg-type]  # of draws, not numbers
    return _loader(dataset, data.workers, batch_sampler=batches)


def build_eval_loaders(
    data: DataConfig,
    preprocess: Preprocess,
    evaluation: EvaluationConfig,
    protocol: Protocol,
    tokenizer: SentenceTokenizer,
    *,
    seed: int = 0,
    perturb: Callable[[Image.Image, int], Image.Image] | None = None,
    boxes: bool = False,
) -> dict[str, DataLoader[Any]]:
    """Build a loader for every split of `evaluation.splits`, by that name: `val`, or `refcoco+:val`.

    A split without a data set's name means that of every data set that has it; with several data sets the names are
    then written out. preprocess, protocol: complete. perturb, boxes: see ReferDataset.
    """
    loaders = {}
    for dataset_name, split, name in resolve_splits(evaluation.splits, data.datasets, data.prepared):
        assert preprocess.sentence_field and protocol.mask_parts
        transform = build_transform(preprocess)
        view = build_view(preprocess)
        sized = None if perturb or view is not None else (transform, protocol.mask_parts)
        dataset = ReferDataset(
            [_open_split(data, dataset_name, split, sized)],
            transform,
            tokenizer,
            sentence_field=preprocess.sentence_field,
            mask_parts=protocol.mask_parts,
            seed=seed,
            first_sentence_only=protocol.sentences == "first",
            keep_original_target=protocol.frame == "original",
            shuffle_sentences=evaluation.shuffle_sentences,
            max_samples=evaluation.max_samples,
            perturb=perturb,
            decoder=data.decoder,
            boxes=boxes,
            view=view,
            talk=build_writer(preprocess, tokenizer, protocol.answers, evaluation.batch_size),
        )
        loaders[name] = _loader(dataset, data.workers, batch_size=evaluation.batch_size)
    return loaders


def resolve_splits(
    splits: Sequence[str], dataset_names: Sequence[str], prepared: str | None
) -> list[tuple[str, str, str]]:
    """(data set, split, name) of every split named. Raises UserError for a split that no data set has."""
    resolved = []
    for entry in splits:
        dataset_name, _, split = entry.rpartition(":")
        owners = (
            [dataset_name] if dataset_name else [n for n in dataset_names if split in find_spec(n, prepared).splits]
        )
        if not owners or split not in find_spec(owners[0], prepared).splits:
            known = {n: find_spec(n, prepared).splits for n in ([dataset_name] if dataset_name else dataset_names)}
            listed = "; ".join(f"{n}: {', '.join(s)}" for n, s in known.items())
            raise UserError(f"no split {entry!r} (evaluation.splits); there are {listed}")
        for owner in owners:
            resolved.append(
                (owner, split, split if len(dataset_names) == 1 and not dataset_name else f"{owner}:{split}")
            )
    return resolved


def _check_weights(data: DataConfig) -> None:
    if data.weights is None:
        return
    if len(data.weights) != len(data.datasets):
        raise UserError(f"data.weights has {len(data.weights)} numbers for {len(data.datasets)} data sets")
    if min(data.weights) < 0 or sum(data.weights) <= 0:
        raise UserError(f"data.weights must be 0 or more, and not all 0; they are {data.weights}")


def _open_split(
    data: DataConfig, name: str, split: str, sized: tuple[ImageTransform, MaskParts] | None = None
) -> OpenSplit:
    """Open one split. sized: transform and mask rule of the presized images that may stand for the originals."""
    rows = open_rows(data.prepared, name, split, streaming=data.streaming)
    presized = _open_presized(data, name, split, *sized) if sized else None
    local = Path(data.prepared) / name
    contents = fingerprint(read_manifest(local), split) if local.is_dir() else ""
    spec = find_spec(name, data.prepared)
    return OpenSplit(name, split, rows, presized, spec.metrics, contents, spec.box_only)


def _open_presized(
    data: DataConfig, name: str, split: str, transform: ImageTransform, mask_parts: MaskParts
) -> PresizedImages | None:
    """Open the presized images of a split as data.presized asks. Raises UserError if they are required and absent."""
    if data.presized is False:
        return None
    local = Path(data.prepared).is_dir()
    found = (
        open_presized(data.prepared, name, split, transform, mask_parts=mask_parts, decoder=data.decoder)
        if local
        else None
    )
    if found is None and data.presized:
        raise UserError(
            f"data.presized is true, but {data.prepared}/{name} has no up-to-date presized images of {split} at "
            f"{transform.size} px ({transform.resize}, masks {mask_parts}, decoder {data.decoder}); write them with "
            f"amltrain data presize --dataset {name} --splits {split} --size {transform.size}, or leave data.presized "
            f"out"
        )
    return found


def _loader(dataset: ReferDataset, workers: int, **batching: Any) -> DataLoader[Any]:
    method = multiprocessing.get_start_method(allow_none=True) or multiprocessing.get_all_start_methods()[0]
    if workers and method == "fork":
        batching = {"multiprocessing_context": _Forks(), **batching}
    return DataLoader(
        dataset,
        num_workers=workers,
        worker_init_fn=_ignore_signals,
        collate_fn=partial(collate, talk=dataset.talk),
        pin_memory=torch.cuda.is_available(),
        **batching,
    )


def _ignore_signals(worker: int) -> None:
    """Ignore signals in a loader process: a scheduler signals every process of a job, and only the trainer may act."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


if sys.platform != "win32":
    from multiprocessing.context import ForkContext, ForkProcess

    class _Fork(ForkProcess):
        """A loader process, started while signals wait: its copy of the trainer's handlers must never act."""

        def start(self) -> None:
            with signals_held():
                super().start()
                # Python ends its children by SIGTERM, which this one ignores, and would then wait for it forever
                self._popen.terminate = self._popen.kill  # type: ignore[attr-defined]

    class _Forks(ForkContext):
        Process = _Fork
