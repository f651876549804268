"""Profiles a few steps with torch.profiler."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch.profiler import ProfilerActivity, profile, schedule
from tqdm.auto import tqdm

SKIPPED = 2
"""Steps before the profiled ones."""


class _NoProfiler:
    def step(self) -> None:
        """Do nothing."""


@contextmanager
def profiled(steps: int | None, output: Path, accelerator: Accelerator) -> Iterator[Any]:
    """Profile `steps` optimizer steps on the main process; None profiles nothing. Call `step()` after each of them.

    Writes OUTPUT/profile/trace.json, for chrome://tracing or ui.perfetto.dev, and OUTPUT/profile/operators.txt.
    """
    if steps is None or not accelerator.is_main_process:
        yield _NoProfiler()
        return
    folder = output / "profile"
    folder.mkdir(exist_ok=True)
    on_cuda = torch.cuda.is_available()

    def write(profiler: Any) -> None:
        profiler.export_chrome_trace(str(folder / "trace.json"))
        order = "self_cuda_time_total" if on_cuda else "self_cpu_time_total"
        (folder / "operators.txt").write_text(profiler.key_averages().table(sort_by=order, row_limit=40) + "\n")
        tqdm.write(f"profile of {steps} steps: {folder}/operators.txt and {folder}/trace.json")

    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_cuda else [])]
    with profile(
        activities=kinds, schedule=schedule(wait=SKIPPED - 1, warmup=1, active=steps, repeat=1), on_trace_ready=write
    ) as profiler:
        yield profiler
