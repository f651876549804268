"""How long saving a checkpoint stops training."""

import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from safetensors.torch import save_file
from torch import Tensor

from amltrain.checkpoints.saver import Saver
from amltrain.environment import choose_device
from benchmarks.steps import Bench
from benchmarks.suite.common import (
    build_supervised,
    build_training_optimizer,
    make_batch,
    seconds_of,
    set_precision,
    side_of,
)

ROUNDS = 3


def saving(*, device: str, model: str, size: int | None, batch: int, precision: str) -> dict[str, Any]:
    """Save model, optimizer state and manifest as the trainer does, to the current folder's disk.

    blocked             seconds that training waits for its copy, median of three
    write               seconds of the write while nothing else runs: what training would wait in the foreground
    step                seconds of a training step; step_while_writing: the same during a write in the background
    """
    chosen, autocast = choose_device(device), set_precision(precision)
    method = build_supervised(model).to(chosen).train()
    optimizer = build_training_optimizer(method)
    data = make_batch(model, batch, side_of(model, size), chosen)
    bench = Bench({"baseline": method}, optimizer, data, autocast)
    step = statistics.median([bench.step(method).total for _ in range(3)][1:])
    accelerator = Accelerator(cpu=chosen.type == "cpu")
    with tempfile.TemporaryDirectory(prefix=".saving-", dir=".") as folder:
        saver = Saver(accelerator, Path(folder), method, optimizer, None, keep=1, write_model=_write_model)
        blocked, write, cpu = [], [], []
        for number in range(ROUNDS):
            start = time.process_time()
            blocked.append(seconds_of(lambda n=number: saver.save(n, {}), bench.clock))  # type: ignore[misc]
            cpu.append(time.process_time() - start)
            write.append(seconds_of(saver.wait, bench.clock))
        saver.save(ROUNDS, {})
        during = []
        while saver.is_writing:
            during.append(bench.step(method).total)
        saver.wait()
        size_on_disk = sum(path.stat().st_size for path in Path(folder).glob("step-*/**/*") if path.is_file())
    return {
        "bytes": size_on_disk,
        "blocked": statistics.median(blocked),
        "blocked_cpu": statistics.median(cpu),
        "write": statistics.median(write),
        "ratio": statistics.median(b / w for b, w in zip(blocked, write, strict=True)),
        "step": step,
        "step_while_writing": statistics.median(during) if during else None,
    }


def _write_model(folder: Path, weights: dict[str, Tensor]) -> None:
    folder.mkdir()
    save_file(weights, folder / "model.safetensors")
