"""The sampler at the size of a large run: cheap to set up, cheap to resume, evenly shared."""

import tracemalloc
from collections import Counter
from itertools import islice

import numpy as np
from accelerate.data_loader import BatchSamplerShard
from torch.utils.data import BatchSampler

from amltrain.data.sampler import CHUNK, EpochSampler, gathered, occurrences
from amltrain.records import Draw


def test_occurrences_count_earlier_places() -> None:
    values = np.random.default_rng(0).integers(0, 50, 1000)
    seen: Counter[int] = Counter()
    for value, count in zip(values.tolist(), occurrences(values).tolist(), strict=True):
        assert count == seen[value]
        seen[value] += 1
    assert occurrences(np.empty(0, np.int64)).tolist() == []


def test_draws_are_draws_also_across_chunks() -> None:
    sampler = EpochSampler([CHUNK + 10], seed=0, global_batch_size=1, total_steps=CHUNK + 20)
    draws = list(sampler)
    assert all(type(draw) is Draw for draw in draws[:3])
    assert len(draws) == len(sampler) and draws[-1].epoch == 1
    assert [draw.index for draw in draws[: CHUNK + 10]] == sampler.order(0).tolist()


def test_resuming_late_costs_one_epochs_order() -> None:
    """Step 500,000 of a run is reached without drawing what came before: memory is that of one epoch's arrays."""
    sampler = EpochSampler([100_000], seed=0, global_batch_size=64, total_steps=600_000, first_step=500_000)
    tracemalloc.start()
    first = list(islice(sampler, 64))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    epoch, offset = divmod(500_000 * 64, 100_000)
    assert [draw.index for draw in first] == sampler.order(epoch)[offset : offset + 64].tolist()
    assert peak < 30 * 2**20


def test_64_processes_get_equal_shares() -> None:
    """Accelerate deals micro-batches in turn: every process gets as many, and together they are the global batches."""
    processes, micro, steps = 64, 2, 12
    options = {"seed": 3, "global_batch_size": 2 * processes * micro, "total_steps": steps}
    shards = [
        list(
            BatchSamplerShard(
                BatchSampler(EpochSampler([1000, 37], **options), micro, drop_last=False), processes, rank
            )
        )
        for rank in range(processes)
    ]
    assert {len(shard) for shard in shards} == {2 * steps}
    assert {len(batch) for shard in shards for batch in shard} == {micro}
    together = [draw for k in range(2 * steps) for shard in shards for draw in shard[k]]
    assert together == list(EpochSampler([1000, 37], **options))


def test_samples_of_a_picture_follow_each_other_as_many_as_asked_for() -> None:
    pictures = np.random.default_rng(3).integers(0, 40, 300)
    for together in (1, 2, 3):
        sampler = EpochSampler(
            [300], seed=1, global_batch_size=10, total_steps=30, pictures=pictures, together=together
        )
        order = sampler.order(0)
        assert sorted(order.tolist()) == list(range(300))
        shown = pictures[order]
        runs = np.diff(np.flatnonzero(np.diff(shown, prepend=-1, append=-1)))
        if together == 1:
            assert order.tolist() == EpochSampler([300], seed=1, global_batch_size=10, total_steps=30).order(0).tolist()
        else:  # chunks of one picture may meet by chance
            whole = sum(-(-count // together) for count in np.bincount(pictures))
            assert len(runs) <= whole and (runs >= together).sum() >= 0.9 * sum(np.bincount(pictures) // together)
        assert not np.array_equal(order, sampler.order(1))


def test_gathering_keeps_where_the_first_of_a_chunk_stood() -> None:
    values = np.array([7, 5, 7, 7, 5, 9, 7])
    assert values[gathered(values, 2)].tolist() == [7, 7, 5, 5, 7, 7, 9]
    assert gathered(values, 1).tolist() == list(range(7))
    assert gathered(np.empty(0, np.int64), 3).tolist() == []
