"""From a run's config to loaders. The order of samples is a function of (seed, epoch) alone."""

import signal
from collections.abc import Callable, Iterator, Sequence
from collections.abc import Set as AbstractSet

import numpy as np
import torch
from PIL import Image
from torch.utils.data import BatchSampler, DataLoader, Sampler

from amltrain.config.schema import DataConfig, EvaluationConfig, MaskParts, Preprocess, Protocol
from amltrain.data.collate import collate
from amltrain.data.dataset import Part, ReferDataset, read_sentences
from amltrain.data.leakage import excluded_images
from amltrain.data.rows import WINDOW, open_rows
from amltrain.data.specs import dataset_spec
from amltrain.data.text import SentenceTokenizer
from amltrain.data.transforms import ImageTransform
from amltrain.errors import UserError
from amltrain.records import Draw


class EpochSampler(Sampler[Draw]):
    """The whole run's draws, one epoch's permutation after the other, from any step on.

    Every sample is drawn once an epoch also where the batch size does not divide the epoch: a batch may then hold the
    end of one epoch and the start of the next. The global batch of step s is draws s * G ... (s + 1) * G - 1, however
    many processes share it.

    Rows that are read in groups (a stream) are shuffled group by group, and samples within a window of a few groups.
    """

    def __init__(
        self,
        part_sizes: Sequence[int],
        *,
        seed: int,
        global_batch_size: int,
        total_steps: int,
        first_step: int = 0,
        weights: Sequence[float] | None = None,
        row_groups: np.ndarray | None = None,
    ) -> None:
        """part_sizes: samples of each data set. weights: share of an epoch that each data set gets; None = its size.

        row_groups: [samples] int64, which samples are read together (`ReferDataset.row_groups`).
        """
        self.part_sizes, self.weights, self.seed = list(part_sizes), weights, seed
        self.row_groups = row_groups
        self.global_batch_size, self.total_steps, self.first_step = global_batch_size, total_steps, first_step

    def __len__(self) -> int:
        return (self.total_steps - self.first_step) * self.global_batch_size

    def __iter__(self) -> Iterator[Draw]:
        length = sum(self.part_sizes)
        position = self.first_step * self.global_batch_size
        end = self.total_steps * self.global_batch_size
        while position < end:
            epoch, offset = divmod(position, length)
            order = self.order(epoch)
            chosen = slice(offset, offset + end - position)
            repeats = occurrences(order)[chosen].tolist()
            yield from (
                Draw(epoch, index, repeat) for index, repeat in zip(order[chosen].tolist(), repeats, strict=True)
            )
            position += len(repeats)

    def order(self, epoch: int) -> np.ndarray:
        """Indices of one epoch, [sum of part_sizes] int64."""
        generator = np.random.default_rng([self.seed & 0xFFFFFFFF, epoch])
        drawn = generator.permutation(self._drawn(generator))
        if self.row_groups is None:
            return drawn
        place = generator.permutation(self.row_groups.max() + 1)  # of every row group in this epoch
        return drawn[np.argsort(place[self.row_groups[drawn]] // WINDOW, kind="stable")]

    def _drawn(self, generator: np.random.Generator) -> np.ndarray:
        """Which samples an epoch holds: all of them once, or every data set's share."""
        length = sum(self.part_sizes)
        if self.weights is None:
            return np.arange(length)
        bounds = np.round(np.cumsum([0, *self.weights]) / sum(self.weights) * length).astype(int)
        first = np.cumsum([0, *self.part_sizes])
        return np.concatenate(
            [
                first[part] + self._repeated(generator, size, bounds[part + 1] - bounds[part])
                for part, size in enumerate(self.part_sizes)
            ]
        )

    @staticmethod
    def _repeated(generator: np.random.Generator, size: int, count: int) -> np.ndarray:
        """`count` of `size` samples: whole permutations, then a part of one."""
        rounds = [generator.permutation(size) for _ in range(-(-count // size))]
        return np.concatenate(rounds)[:count] if rounds else np.empty(0, np.int64)


def occurrences(values: np.ndarray) -> np.ndarray:
    """How often each value occurs before its place, [N] -> [N] int64: (7, 5, 7, 7) -> (0, 0, 1, 2)."""
    places = np.arange(len(values))
    by_value = np.argsort(values, kind="stable")
    starts = np.diff(values[by_value], prepend=values[by_value[:1]] - 1) != 0
    counted = np.empty_like(places)
    counted[by_value] = places - np.maximum.accumulate(np.where(starts, places, 0))
    return counted


def build_transform(preprocess: Preprocess) -> ImageTransform:
    """preprocess: complete."""
    assert preprocess.size and preprocess.resize and preprocess.normalization
    return ImageTransform(preprocess.size, preprocess.resize, preprocess.normalization)


def build_tokenizer(data: DataConfig, preprocess: Preprocess) -> SentenceTokenizer:
    """The protocol's tokenizer; `wordpiece` is built from the training sentences."""
    assert preprocess.tokenizer and preprocess.max_tokens and preprocess.sentence_field
    if preprocess.tokenizer != "wordpiece":
        return SentenceTokenizer.load(preprocess.tokenizer, preprocess.max_tokens)
    parts = [_open_part(data, name, data.train_split) for name in data.datasets]
    sentences = (sentence for part in parts for sentence in read_sentences(part.rows, preprocess.sentence_field))
    return SentenceTokenizer.train_wordpiece(sentences, preprocess.max_tokens)


def build_train_dataset(
    data: DataConfig,
    preprocess: Preprocess,
    tokenizer: SentenceTokenizer,
    *,
    mask_parts: MaskParts,
    seed: int,
) -> ReferDataset:
    """Training samples of all the data sets, without the images that any of them evaluates on (data.leak_filter).

    mask_parts: data.mask_parts, or what stands for null there.
    """
    assert preprocess.sentence_field
    _check_weights(data)
    parts = [_open_part(data, name, data.train_split) for name in data.datasets]
    excluded = leaks(data) if len(data.datasets) > 1 or data.also_held_out or data.held_out_ids else frozenset()
    dataset = ReferDataset(
        parts,
        build_transform(preprocess),
        tokenizer,
        unit=data.train_unit,
        sentence_field=preprocess.sentence_field,
        mask_parts=mask_parts,
        seed=seed,
        excluded_images=excluded,
    )
    empty = [part.dataset for part, size in zip(parts, dataset.part_sizes, strict=True) if size == 0]
    if empty:
        raise UserError(f"{', '.join(empty)}: no training sample is left; check data.train_split and leak_filter")
    return dataset


def leaks(data: DataConfig) -> AbstractSet[int]:
    """Ids of the images that training must not see; none without the leak filter."""
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
    """The draws of a training from `first_step` on."""
    return EpochSampler(
        dataset.part_sizes,
        seed=seed,
        global_batch_size=global_batch_size,
        total_steps=total_steps,
        first_step=first_step,
        weights=data.weights,
        row_groups=dataset.row_groups(),
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
) -> DataLoader:
    """Micro-batches of the whole run from `first_step` on; Accelerate deals them to the processes in turn."""
    sampler = build_sampler(
        dataset,
        data,
        seed=seed,
        global_batch_size=global_batch_size,
        total_steps=total_steps,
        first_step=first_step,
    )
    batches = BatchSampler(sampler, micro_batch_size, drop_last=False)  # type: ignore[arg-type]
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
) -> dict[str, DataLoader]:
    """A loader for every split of `evaluation.splits`, by that name: `val`, or `refcoco+:val`.

    A split without a data set's name means that of every data set that has it; with several data sets the names are
    then written out. preprocess, protocol: complete. perturb: see ReferDataset.
    """
    loaders = {}
    for dataset_name, split, name in resolve_splits(evaluation.splits, data.datasets):
        assert preprocess.sentence_field and protocol.mask_parts
        dataset = ReferDataset(
            [_open_part(data, dataset_name, split)],
            build_transform(preprocess),
            tokenizer,
            sentence_field=preprocess.sentence_field,
            mask_parts=protocol.mask_parts,
            seed=seed,
            first_sentence_only=protocol.sentences == "first",
            keep_original_target=protocol.frame == "original",
            shuffle_sentences=evaluation.shuffle_sentences,
            max_samples=evaluation.max_samples,
            perturb=perturb,
        )
        loaders[name] = _loader(dataset, data.workers, batch_size=evaluation.batch_size)
    return loaders


def resolve_splits(splits: Sequence[str], dataset_names: Sequence[str]) -> list[tuple[str, str, str]]:
    """(data set, split, name) of every split named. Raises UserError for a split that no data set has."""
    resolved = []
    for entry in splits:
        dataset_name, _, split = entry.rpartition(":")
        owners = [dataset_name] if dataset_name else [n for n in dataset_names if split in dataset_spec(n).splits]
        if not owners or split not in dataset_spec(owners[0]).splits:
            known = {n: dataset_spec(n).splits for n in ([dataset_name] if dataset_name else dataset_names)}
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


def _open_part(data: DataConfig, name: str, split: str) -> Part:
    return Part(name, split, open_rows(data.prepared, name, split, streaming=data.streaming))


def _loader(dataset: ReferDataset, workers: int, **batching: object) -> DataLoader:
    return DataLoader(
        dataset,
        num_workers=workers,
        worker_init_fn=_leave_signals_to_the_trainer,
        collate_fn=collate,
        pin_memory=torch.cuda.is_available(),
        **batching,  # type: ignore[arg-type]
    )


def _leave_signals_to_the_trainer(worker: int) -> None:
    """A scheduler signals every process of a job; a loader that died of it would keep the trainer from saving."""
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
