"""What a run says: the banner, the log, the trackers. Only the main process speaks."""

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from tqdm.auto import tqdm

from amltrain import __version__
from amltrain.config.schema import RunConfig
from amltrain.errors import UserError
from amltrain.training.build import Parts
from amltrain.training.distributed import BatchPlan, precision_of


def say(accelerator: Accelerator, text: str) -> None:
    """A line above the progress bar."""
    if accelerator.is_main_process:
        tqdm.write(text)


def banner(config: RunConfig, parts: Parts, accelerator: Accelerator, plan: BatchPlan, total_steps: int) -> str:
    """Everything that decides a run's numbers, at its start."""
    trained = sum(p.numel() for p in parts.method.model.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in parts.method.model.parameters() if not p.requires_grad)
    counts = parts.dataset.counts()
    epochs = total_steps * plan.samples / len(parts.dataset)
    p = parts.preprocess
    splits = [f"{name} ({len(loader.dataset):,})" for name, loader in parts.eval_loaders.items()]  # type: ignore
    lines = {
        "model": f"{config.model.name}, {trained / 1e6:.2f} M parameters trained, {frozen / 1e6:.2f} M frozen",
        "method": parts.method.summary(),
        "data": f"{' + '.join(config.data.datasets)} {config.data.train_split}: {counts['images']:,} images, "
        f"{counts['refs']:,} refs, {counts['expressions']:,} expressions",
        "epoch": f"every {config.data.train_unit} once",
        "evaluate": ", ".join(splits),
        "input": f"{p.size} px {p.resize}, {p.max_tokens} tokens of {p.sentence_field!r} by {p.tokenizer}",
        "batch": str(plan),
        "steps": f"{total_steps:,} ({epochs:.1f} epochs)",
        "precision": precision_of(accelerator).replace("no", "fp32"),
        "device": _device(accelerator),
        "output": config.output,
    }
    return f"amltrain {__version__}\n" + "\n".join(f"  {key:10} {value}" for key, value in lines.items())


def _device(accelerator: Accelerator) -> str:
    """Where a run computes; `accelerate launch` gives it one CPU thread unless told otherwise."""
    spread = "one process" if accelerator.num_processes == 1 else accelerator.distributed_type.value.lower()
    name = f"{accelerator.device}, {spread}"
    if accelerator.device.type != "cpu":
        return name
    threads, cores = torch.get_num_threads(), (os.cpu_count() or 1) // accelerator.num_processes
    return f"{name}, {threads} threads" + (f" (OMP_NUM_THREADS={cores} uses every core)" if threads < cores else "")


def start_trackers(accelerator: Accelerator, config: RunConfig, first_step: int) -> None:
    """Start the trackers that the run names; none of them is asked for a login unless it is named.

    first_step: steps done; TensorBoard drops what a killed run had logged beyond them.
    """
    options = {"tensorboard": {"purge_step": first_step + 1}} if "tensorboard" in config.tracking.trackers else {}
    try:
        accelerator.init_trackers("amltrain", config=_flat(asdict(config)), init_kwargs=options)
    except (ImportError, ValueError) as error:
        raise UserError(f"tracking.trackers={config.tracking.trackers}: {error}") from error


class History:
    """`log.jsonl`: one line per logged step and evaluation; a resumed run drops the lines it will write again.

    Processes other than the main one pass enabled=False, and write nothing.
    """

    def __init__(self, path: Path, first_step: int, *, enabled: bool) -> None:
        self.path, self.enabled = path, enabled
        if enabled and path.is_file():
            kept = [line for line in path.read_text().splitlines() if _step(line) <= first_step]
            path.write_text("".join(f"{line}\n" for line in kept))

    def add(self, step: int, values: dict[str, Any]) -> None:
        if not self.enabled:
            return
        with self.path.open("a") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")


def _step(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError):
        return float("inf")  # cut off by a kill


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat.update(_flat(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value if isinstance(value, (int, float, str, bool, torch.Tensor)) else str(value)
    return flat
