"""The header, the log lines and the log file of a run. Only the main process writes."""

import json
import os
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from amltrain import __version__
from amltrain.config.schema import RunConfig
from amltrain.files import write_text
from amltrain.training.build import RunComponents
from amltrain.training.checks import weights_origin
from amltrain.training.distributed import BatchPlan, precision_of


def banner(
    config: RunConfig,
    components: RunComponents,
    accelerator: Accelerator,
    plan: BatchPlan,
    total_steps: int,
    last_step: int,
) -> str:
    """Everything that decides a run's numbers, printed at its start. total_steps: of the schedule."""
    model = components.method.model
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    counts = components.dataset.counts()
    epochs = last_step * plan.samples / len(components.dataset)
    schedule = f", on the schedule of {total_steps:,}" if total_steps > last_step else ""
    p = components.preprocess
    sets: dict[str, Any] = {name: loader.dataset for name, loader in components.eval_loaders.items()}
    splits = [f"{name} ({len(dataset):,})" for name, dataset in sets.items()]
    precision = precision_of(accelerator).replace("no", "fp32")
    if accelerator.device.type == "cuda":
        precision += f", TF32 {'on' if config.train.tf32 else 'off'}"
    lines = {
        "model": f"{config.model.name}, {trained / 1e6:.2f} M parameters trained, {frozen / 1e6:.2f} M frozen",
        "weights": weights_origin(config, model),
        "method": components.method.summary(),
        "data": f"{' + '.join(config.data.datasets)} {config.data.train_split}: {counts['images']:,} images, "
        f"{counts['refs']:,} refs, {counts['expressions']:,} expressions",
        "epoch": f"every {config.data.train_unit} once",
        "evaluate": ", ".join(splits),
        "input": f"{p.size} px {p.resize}, {p.max_tokens} tokens of {p.sentence_field!r} by {p.tokenizer}",
        "batch": str(plan),
        "steps": f"{last_step:,} ({epochs:.1f} epochs){schedule}",
        "precision": precision,
        "device": _device(accelerator),
        "output": "none: train.dry_run keeps nothing" if config.train.dry_run else str(config.folder),
    }
    return f"amltrain {__version__}\n" + "\n".join(f"  {key:10} {value}" for key, value in lines.items())


def _device(accelerator: Accelerator) -> str:
    """Where a run computes; `accelerate launch` gives it one CPU thread by default."""
    spread = "one process" if accelerator.num_processes == 1 else accelerator.distributed_type.value.lower()
    name = f"{accelerator.device}, {spread}"
    if accelerator.device.type != "cpu":
        return name
    threads, cores = torch.get_num_threads(), (os.cpu_count() or 1) // accelerator.num_processes
    return f"{name}, {threads} threads" + (f" (OMP_NUM_THREADS={cores} uses every core)" if threads < cores else "")


def log_line(step: int, total_steps: int, images_per_step: int, values: dict[str, float]) -> str:
    """Format a step as one plain line, for outputs without a progress bar. The time left is that of training alone."""
    left = timedelta(seconds=round((total_steps - step) * images_per_step / values["images_per_second"]))
    return (
        f"step {step:,}/{total_steps:,} ({step / total_steps:.0%}), epoch {values['epoch']:.2f}, "
        f"loss {values['loss']:.4f}, lr {values['lr']:.1e}, {values['images_per_second']:.1f} images/s, "
        f"{values['data_wait_percent']:.0f} % waiting for data, {values['memory_gib']:.1f} GiB, {left} left"
    )


class History:
    """`log.jsonl`: one line per logged step and evaluation.

    A resumed run keeps the first `keep` lines, those that its checkpoint knew, and writes the rest again. `lines` is
    their number. Processes other than the main one pass enabled=False, and write nothing.
    """

    def __init__(self, path: Path, keep: int, *, enabled: bool) -> None:
        self.path, self.enabled, self.lines = path, enabled, 0
        if enabled and path.is_file():
            kept = path.read_text(encoding="utf-8").splitlines(keepends=True)[:keep]
            kept = [line for line in kept if line.endswith("\n")]  # the last one may be truncated by a power failure
            write_text(path, "".join(kept))
            self.lines = len(kept)

    def add(self, step: int, values: dict[str, Any]) -> None:
        """Append a line."""
        if not self.enabled:
            return
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")
        self.lines += 1
