"""What a run tells: its header, log lines and log file, its trackers, and how fast it trains.

Only the main process writes the log and starts trackers (TensorBoard, wandb, trackio, ...).
"""

import html
import json
import os
import secrets
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image

from amltrain import __version__
from amltrain.checkpoints.resume import complete_options
from amltrain.config.schema import RunConfig, sectioned
from amltrain.data.augment import described
from amltrain.distributed import BatchPlan, precision_of
from amltrain.environment import code_commit
from amltrain.errors import UserError, first_line
from amltrain.evaluation.results import Results
from amltrain.evaluation.tables import table
from amltrain.files import write_text
from amltrain.run_folder import PICTURES, TRACKERS_FILE, checkpoint_name
from amltrain.training.build import RunComponents, weights_origin


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
    p, o = components.preprocess, config.optim
    groups = components.method.param_groups(o.lr, o.weight_decay)
    rates: dict[float, list[str]] = {}
    for number, group in enumerate(groups):
        name = str(group.get("name", f"group {number}")).removesuffix("_no_decay").removesuffix("_decay")
        named = rates.setdefault(float(group.get("lr", o.lr)), [])
        if name not in named:
            named.append(name)
    names, built = config.data.augment, components.dataset.augmentations
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
        **({"boxes": origin} if (origin := components.dataset.box_origin()) else {}),
        **({"instances": origin} if (origin := components.dataset.instance_origin()) else {}),
        **({"augment": described(names, list(built), components.dataset)} if names else {}),
        "epoch": f"every {config.data.train_unit} once",
        "evaluate": ", ".join(splits),
        "input": f"{p.size} px {p.resize}, {p.max_tokens} tokens of {p.sentence_field!r} by {p.tokenizer}",
        "batch": str(plan),
        "steps": f"{last_step:,} ({epochs:.1f} epochs){schedule}",
        "optimizer": f"{o.optimizer}, lr "
        + "; ".join(f"{rate:g} of {', '.join(names)}" for rate, names in rates.items())
        + (f", {o.layer_decay:g} of it per block of the encoders" if o.layer_decay is not None else "")
        + f"; {o.schedule}, {o.warmup_steps:,} warm-up steps",
        "seed": str(config.seed),
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
            with path.open("r+b") as file:  # line by line: a long run's log does not fit into memory
                end = 0
                while self.lines < keep and (line := file.readline()).endswith(b"\n"):  # a power failure cuts the last
                    self.lines, end = self.lines + 1, end + len(line)
                file.truncate(end)

    def add(self, step: int, values: dict[str, Any]) -> None:
        """Append a line."""
        if not self.enabled:
            return
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")
        self.lines += 1


def start_trackers(accelerator: Accelerator, config: RunConfig, first_step: int, log: Callable[[str], None]) -> None:
    """Start the trackers that the run names; a resumed run continues its run in each of them. Main process only.

    first_step: steps done; TensorBoard drops what a killed run had logged beyond them. Raises UserError for a tracker
    that cannot start, unless tracking.optional leaves it out.
    """
    wanted, started = list(accelerator.log_with), []
    known = {**sectioned(config), config.method: complete_options(config), "commit": code_commit() or "unknown"}
    options = _tracker_options(config, first_step)
    for tracker in wanted:
        accelerator.log_with, accelerator.trackers = [tracker], []
        try:
            accelerator.init_trackers(config.tracking.project, config=_flat(known), init_kwargs=options)
            started += accelerator.trackers
        except Exception as error:  # each tracker's client raises its own errors
            accelerator.trackers = started  # without this one, which end_training could not finish
            reason = f"tracking.trackers: {tracker_name(tracker)} could not start ({first_line(error)})"
            if not config.tracking.optional:
                raise UserError(
                    f"{reason}; log in or configure it, leave it out, or set tracking.optional to true"
                ) from error
            log(f"WARNING: {reason}; the run continues without it")
    accelerator.log_with, accelerator.trackers = wanted, started


def tracker_name(tracker: Any) -> str:
    """The name of one of Accelerate's trackers as tracking.trackers spells it."""
    return str(getattr(tracker, "value", tracker))


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
    prefix = f"{checkpoint_name(step)}-"
    pictures = {
        f"predictions/{sheet.stem.removeprefix(prefix)}": np.asarray(Image.open(sheet).convert("RGB"))
        for sheet in sorted((output / PICTURES).glob(f"{prefix}*.png"))
    }
    for tracker in accelerator.trackers:
        if send := _SENDERS.get(tracker.name):
            send(tracker, table(results), pictures, step)


Pictures = dict[str, np.ndarray]
"""Tag -> [height, width, 3] uint8."""


def _to_tensorboard(tracker: Any, text: str, pictures: Pictures, step: int) -> None:
    tracker.writer.add_text("evaluation", text, global_step=step)
    for tag, picture in pictures.items():
        tracker.writer.add_image(tag, picture, global_step=step, dataformats="HWC")


def _to_wandb(tracker: Any, text: str, pictures: Pictures, step: int) -> None:
    import wandb  # an extra

    images = {tag: wandb.Image(picture) for tag, picture in pictures.items()}
    tracker.log({"evaluation": wandb.Html(f"<pre>{html.escape(text)}</pre>"), **images}, step=step)


def _to_trackio(tracker: Any, text: str, pictures: Pictures, step: int) -> None:
    import trackio  # an extra

    images = {tag: trackio.Image(picture) for tag, picture in pictures.items()}
    tracker.log({"evaluation": trackio.Markdown(text), **images}, step=step)


_SENDERS = {"tensorboard": _to_tensorboard, "wandb": _to_wandb, "trackio": _to_trackio}


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat.update(_flat(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value if isinstance(value, (int, float, str, bool, torch.Tensor)) else str(value)
    return flat


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
    if os.name == "nt":
        return 0  # not measured: the module that reads it is not there
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
