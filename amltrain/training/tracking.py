"""The header, the log file and the trackers of a run. Only the main process writes."""

import json
import os
import secrets
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image

from amltrain import __version__
from amltrain.config.schema import RunConfig, sectioned
from amltrain.errors import UserError, first_line
from amltrain.evaluation.results import Results
from amltrain.evaluation.tables import table
from amltrain.files import write_text
from amltrain.training.build import RunComponents
from amltrain.training.checkpoint import checkpoint_name
from amltrain.training.checks import weights_origin
from amltrain.training.distributed import BatchPlan, precision_of

TRACKERS_FILE = "trackers.json"
"""Ids of the run in trackers that continue a run by its id."""


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
        "output": str(config.folder),
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


def start_trackers(accelerator: Accelerator, config: RunConfig, first_step: int, log: Callable[[str], None]) -> None:
    """Start the trackers that the run names; a resumed run continues its run in each of them.

    first_step: steps done; TensorBoard drops what a killed run had logged beyond them. Raises UserError for a tracker
    that cannot start, unless tracking.optional leaves it out.
    """
    wanted, started = list(accelerator.log_with), []
    options = _tracker_options(config, first_step) if accelerator.is_main_process else {}
    for tracker in wanted:
        accelerator.log_with = [tracker]
        try:
            accelerator.init_trackers(config.tracking.project, config=_flat(sectioned(config)), init_kwargs=options)
            started += accelerator.trackers
        except Exception as error:  # each tracker's client raises its own errors
            reason = f"tracking.trackers: {getattr(tracker, 'value', tracker)} could not start ({first_line(error)})"
            if not config.tracking.optional:
                raise UserError(
                    f"{reason}; log in or configure it, leave it out, or set tracking.optional to true"
                ) from error
            log(f"WARNING: {reason}; the run continues without it")
        accelerator.trackers = []
    accelerator.log_with, accelerator.trackers = wanted, started


def _tracker_options(config: RunConfig, first_step: int) -> dict[str, dict[str, Any]]:
    """Arguments of each tracker's start; the ids of the run are made once and kept in the output folder."""
    path = config.folder / TRACKERS_FILE
    try:
        ids = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        ids = {}
    name = config.tracking.name or config.folder.name
    group = {} if config.tracking.group is None else {"group": config.tracking.group}
    options: dict[str, dict[str, Any]] = {}
    if "tensorboard" in config.tracking.trackers:
        options["tensorboard"] = {"purge_step": first_step + 1}
    if "wandb" in config.tracking.trackers:
        ids.setdefault("wandb", secrets.token_hex(4))
        options["wandb"] = {"id": ids["wandb"], "name": name, "resume": "allow", "dir": str(config.folder), **group}
    if "trackio" in config.tracking.trackers:
        ids.setdefault("trackio", f"{name}-{secrets.token_hex(4)}")  # trackio knows a run by its name
        options["trackio"] = {"name": ids["trackio"], "resume": "allow", **group}
    if ids:
        write_text(path, json.dumps(ids, indent=1) + "\n")
    return options


def track_evaluation(accelerator: Accelerator, output: Path, results: list[Results], step: int) -> None:
    """Send an evaluation's table and pictures to the trackers that take text and pictures."""
    if not accelerator.is_main_process or not accelerator.trackers:
        return
    sheets = sorted((output / "pictures").glob(f"{checkpoint_name(step)}-*.png"))
    pictures = {
        f"predictions/{sheet.stem.removeprefix(checkpoint_name(step) + '-')}": np.asarray(
            Image.open(sheet).convert("RGB")
        )[None]
        for sheet in sheets
    }
    for tracker in accelerator.trackers:
        if tracker.name == "tensorboard":
            tracker.writer.add_text("evaluation", table(results), global_step=step)
            if pictures:
                tracker.log_images(pictures, step=step, dataformats="NHWC")
        elif tracker.name == "wandb" and pictures:
            tracker.log_images({name: list(images) for name, images in pictures.items()}, step=step)


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


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat.update(_flat(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value if isinstance(value, (int, float, str, bool, torch.Tensor)) else str(value)
    return flat
