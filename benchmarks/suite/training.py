"""Training steps: by method and precision, by batch size, and through Accelerate's engines."""

import statistics
import time
from typing import Any

import torch
from accelerate.utils import DistributedType

from amltrain.config.schema import RunConfig
from amltrain.distributed import build_accelerator
from amltrain.environment import choose_device
from amltrain.errors import UserError
from amltrain.training.optim import compile_blocks
from benchmarks.steps import Result, build_bench, contenders
from benchmarks.suite.common import (
    build_supervised,
    build_training_optimizer,
    clock_of,
    free,
    make_batch,
    peak_memory,
    seconds_of,
    set_precision,
    side_of,
)

ROOM = 100.0
"""Seconds after which no larger batch is tried."""


def steps(
    *,
    device: str,
    model: str,
    size: int | None,
    batch: int,
    rounds: int,
    precision: str,
    compiled: bool = False,
    count: int | None = None,
) -> dict[str, Any]:
    """Training steps of every contender; half the batch is tried where memory ends.

    first_step: seconds of the first one, which compiles. rows: by contender, medians. count: of the contenders; None =
    all.
    """
    chosen, autocast, side = choose_device(device), set_precision(precision), side_of(model, size)
    compared = dict(list(contenders(side).items())[:count])

    def attempt(samples: int) -> tuple[float, list[Result]] | None:
        try:
            bench = build_bench(model, compared, batch=samples, size=side, precision=autocast, device=chosen)
            baseline = next(iter(bench.tasks.values()))
            if compiled:
                compile_blocks(baseline.model)
            first = seconds_of(lambda: bench.step(baseline), bench.clock)
            return first, bench.run(rounds, warmup=2)
        except torch.OutOfMemoryError:
            return None

    found = attempt(batch)
    while found is None:
        free(chosen)
        if batch == 1:
            raise UserError("out of memory, also with one sample")
        batch //= 2
        found = attempt(batch)
    rows = [
        {"step": r.name, "seconds": r.seconds, "ratio": r.ratio, "rate": batch / r.seconds, "memory": r.memory}
        for r in found[1]
    ]
    return {"size": side, "batch": batch, "first_step": found[0], "rows": rows}


def batch_sizes(
    *,
    device: str,
    model: str,
    size: int | None,
    precision: str,
    largest: int,
    rounds: int,
    checkpointing: bool = False,
) -> dict[str, Any]:
    """Training steps without AML at 1, 2, 4, ... samples until memory, or `ROOM` seconds, are over."""
    chosen, autocast, side = choose_device(device), set_precision(precision), side_of(model, size)
    baseline = dict(list(contenders(side).items())[:1])
    bench = build_bench(model, baseline, batch=1, size=side, precision=autocast, device=chosen)
    next(iter(bench.tasks.values())).model.set_gradient_checkpointing(checkpointing)
    rows: list[dict[str, Any]] = []
    end, batch, ended = time.monotonic() + ROOM, 1, "largest batch asked for"
    while batch <= largest:
        if time.monotonic() > end:
            ended = "time"
            break
        try:
            bench.batch = make_batch(model, batch, side, chosen)
            (result,) = bench.run(rounds, warmup=1)
        except torch.OutOfMemoryError:
            ended = "memory"
            break
        except ValueError as error:  # a batch norm cannot train on one sample
            if batch > 1 or "more than 1 value" not in str(error):
                raise
        else:
            rows.append({"batch": batch, "rate": batch / result.seconds, "memory": result.memory})
        batch *= 2
    return {"size": side, "ended_by": ended, "rows": rows}


def engine(
    *, device: str, model: str, size: int | None, batch: int, rounds: int, precision: str, sharded: bool
) -> dict[str, Any]:
    """Whole optimizer steps as the trainer takes them, clipped, through the engine of this process's environment.

    sharded: whether that is FSDP2. Raises UserError where Accelerate has chosen another one.
    """
    chosen, side = choose_device(device), side_of(model, size)
    set_precision(precision)
    config = RunConfig()
    config.train.global_batch_size = batch
    config.train.mixed_precision = "bf16" if precision == "bf16" else "no"
    config.tracking.trackers = []
    accelerator, _ = build_accelerator(config)
    if sharded != (accelerator.distributed_type == DistributedType.FSDP):
        raise UserError("Accelerate does not run FSDP2 on this device")
    method = build_supervised(model).to(accelerator.device)
    wrapped, optimizer = accelerator.prepare(method, build_training_optimizer(method))
    wrapped.train()
    data = make_batch(model, batch, side, accelerator.device)

    def step() -> None:
        with accelerator.accumulate(wrapped):
            with accelerator.autocast():
                result = wrapped(data)
            accelerator.backward(result["loss"])
            accelerator.clip_grad_norm_(wrapped.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()

    with peak_memory(chosen) as peak:
        for _ in range(2):
            step()
        seconds = statistics.median(seconds_of(step, clock_of(chosen)) for _ in range(rounds))
    kind = accelerator.distributed_type.value
    rate = batch / seconds
    return {"size": side, "batch": batch, "engine": kind, "seconds": seconds, "rate": rate, "memory": peak[0]}
