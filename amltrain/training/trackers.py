"""The trackers of a run (TensorBoard, wandb, trackio, ...). Only the main process starts and writes them."""

import html
import json
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image

from amltrain.config.schema import RunConfig, sectioned
from amltrain.errors import UserError, first_line
from amltrain.evaluation.results import Results
from amltrain.evaluation.tables import table
from amltrain.files import write_text
from amltrain.training.checkpoint import checkpoint_name

TRACKERS_FILE = "trackers.json"
"""Ids of the run in trackers that continue a run by its id."""


def start_trackers(accelerator: Accelerator, config: RunConfig, first_step: int, log: Callable[[str], None]) -> None:
    """Start the trackers that the run names; a resumed run continues its run in each of them. Main process only.

    first_step: steps done; TensorBoard drops what a killed run had logged beyond them. Raises UserError for a tracker
    that cannot start, unless tracking.optional leaves it out.
    """
    wanted, started = list(accelerator.log_with), []
    options = _tracker_options(config, first_step)
    for tracker in wanted:
        accelerator.log_with, accelerator.trackers = [tracker], []
        try:
            accelerator.init_trackers(config.tracking.project, config=_flat(sectioned(config)), init_kwargs=options)
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
        for sheet in sorted((output / "pictures").glob(f"{prefix}*.png"))
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
