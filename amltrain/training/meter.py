"""Measures how fast a run trains: images per second, time spent waiting for data, memory."""

import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

MEASURED = ("images_per_second", "data_wait_percent", "memory_gib")
"""Names in log rows that differ between two runs of the same training."""


class Meter:
    """A stopwatch over the steps since the last `read`, without pauses for evaluation and saving."""

    def __init__(self, images_per_step: int, device: torch.device) -> None:
        self.images_per_step, self.device = images_per_step, device
        self._reset()

    def step(self) -> None:
        """Count an optimizer step."""
        self._steps += 1

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Time that passes here was spent waiting for data."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._waited += time.perf_counter() - start

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time that passes here does not count."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._start += time.perf_counter() - start

    def read(self) -> dict[str, float]:
        """Images per second over all processes, percent of the time spent waiting, GiB at most; then start again.

        Memory is what this process allocated on its GPU, or its resident memory on a CPU.
        """
        seconds = max(time.perf_counter() - self._start, 1e-9)
        values = (
            self._steps * self.images_per_step / seconds,
            100 * min(1.0, self._waited / seconds),
            peak_memory(self.device) / 2**30,
        )
        self._reset()
        return dict(zip(MEASURED, values, strict=True))

    def _reset(self) -> None:
        self._start, self._waited, self._steps = time.perf_counter(), 0.0, 0


def peak_memory(device: torch.device) -> int:
    """Most bytes in use so far."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
