"""The sampler at the size of a large run: cheap to set up, cheap to resume, evenly shared."""

import tracemalloc
from collections import Counter
from itertools import islice

import numpy as np
from accelerate.data_loader import BatchSamplerShard
from torch.utils.data import BatchSampler

from amltrain.data.sampler import CHUNK, EpochSampler, occurrences
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
