"""Which samples a run draws, in which order. The order is a function of (seed, epoch) alone."""

from collections.abc import Iterator, Sequence
from functools import partial
from itertools import repeat

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Sampler

from amltrain.data.rows import WINDOW
from amltrain.records import Draw

CHUNK = 65536
"""Draws that are turned into Python objects at a time, which bounds the memory of a large epoch."""
_draw = partial(tuple.__new__, Draw)
"""Make a Draw from a tuple, without the Python call of `Draw._make`: an epoch may have millions."""


class EpochSampler(Sampler[Draw]):
    """Sampler over a whole run: one permutation per epoch, from any step on.

    Every sample is drawn once per epoch, also where the batch size does not divide the epoch: a batch may then hold the
    end of one epoch and the start of the next. The global batch of step s is draws s * G ... (s + 1) * G - 1, for any
    number of processes.

    Samples of one picture can be made to follow each other, `together` at a time.

    Rows that are read in groups (streaming) are shuffled group by group, and samples within a window of a few groups.
    """

    def __init__(
        self,
        split_sizes: Sequence[int],
        *,
        seed: int,
        global_batch_size: int,
        total_steps: int,
        first_step: int = 0,
        weights: Sequence[float] | None = None,
        row_groups: NDArray[np.int64] | None = None,
        pictures: NDArray[np.int64] | None = None,
        together: int = 1,
    ) -> None:
        """split_sizes: number of samples of each data set. weights: share of an epoch that each data set gets; None =
        in proportion to its size. global_batch_size G: samples per optimizer step over all processes.

        row_groups: [samples] int64, which samples are read together (`ReferDataset.row_groups`). pictures: [samples]
        int64, equal for samples of one picture, of which up to `together` follow each other.
        """
        self.split_sizes, self.weights, self.seed = list(split_sizes), weights, seed
        self.row_groups, self.pictures, self.together = row_groups, pictures, together
        self.global_batch_size, self.total_steps, self.first_step = global_batch_size, total_steps, first_step

    def __len__(self) -> int:
        return (self.total_steps - self.first_step) * self.global_batch_size

    def __iter__(self) -> Iterator[Draw]:
        length = sum(self.split_sizes)
        position = self.first_step * self.global_batch_size
        end = self.total_steps * self.global_batch_size
        while position < end:
            epoch, offset = divmod(position, length)
            order = self.order(epoch)
            # without weights no sample comes twice in an epoch
            repeats = np.zeros_like(order) if self.weights is None else occurrences(order)
            stop = min(length, offset + end - position)
            position += stop - offset
            for start in range(offset, stop, CHUNK):
                chunk = slice(start, min(start + CHUNK, stop))
                yield from map(_draw, zip(repeat(epoch), order[chunk].tolist(), repeats[chunk].tolist(), strict=False))

    def order(self, epoch: int) -> NDArray[np.int64]:
        """Indices of one epoch, [sum of split_sizes] int64."""
        generator = np.random.default_rng([self.seed & 0xFFFFFFFF, epoch])
        drawn = generator.permutation(self._drawn(generator))
        if self.pictures is not None and self.together > 1:
            drawn = drawn[gathered(self.pictures[drawn], self.together)]
        if self.row_groups is None:
            return drawn
        place = generator.permutation(self.row_groups.max() + 1)  # of every row group in this epoch
        return drawn[np.argsort(place[self.row_groups[drawn]] // WINDOW, kind="stable")]

    def _drawn(self, generator: np.random.Generator) -> NDArray[np.int64]:
        """Samples of one epoch, unordered: all of them once, or every data set's share."""
        length = sum(self.split_sizes)
        if self.weights is None:
            return np.arange(length)
        bounds = np.round(np.cumsum([0, *self.weights]) / sum(self.weights) * length).astype(int)
        first = np.cumsum([0, *self.split_sizes])
        return np.concatenate(
            [
                first[number] + self._repeated(generator, size, bounds[number + 1] - bounds[number])
                for number, size in enumerate(self.split_sizes)
            ]
        )

    @staticmethod
    def _repeated(generator: np.random.Generator, size: int, count: int) -> NDArray[np.int64]:
        """Draw `count` of `size` samples: whole permutations, then the start of one."""
        rounds = [generator.permutation(size) for _ in range(-(-count // size))]
        return np.concatenate(rounds)[:count] if rounds else np.empty(0, np.int64)


def occurrences(values: NDArray[np.int64]) -> NDArray[np.int64]:
    """Count how often each value occurs before its place, [N] -> [N] int64: (7, 5, 7, 7) -> (0, 0, 1, 2).

    values: 0 or more; values times N must fit into 63 bits.
    """
    count = len(values)
    places = np.arange(count)
    # one number for value and place: several times faster than a stable argsort
    by_value, where = np.divmod(np.sort(values * count + places), max(count, 1))
    starts = np.diff(by_value, prepend=-1) != 0
    counted = np.empty_like(places)
    counted[where] = places - np.maximum.accumulate(np.where(starts, places, 0))
    return counted


def gathered(values: NDArray[np.int64], together: int) -> NDArray[np.int64]:
    """Positions that put equal values behind each other, [N] -> [N] int64: `together` at a time, each such chunk where
    its first value stood.
    """
    _, number = np.unique(values, return_inverse=True)
    chunk = occurrences(number) // together
    keys = number * (chunk.max(initial=0) + 1) + chunk
    _, first, owner = np.unique(keys, return_index=True, return_inverse=True)
    return np.argsort(first[owner], kind="stable")
