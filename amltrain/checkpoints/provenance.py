"""Record where weights came from: recipe, code, libraries, hardware. The model card shows it."""

import importlib.metadata
import os
import platform
from functools import cache
from pathlib import Path
from typing import Any

import torch

from amltrain import __version__
from amltrain.config.schema import MaskParts, RunConfig, sectioned
from amltrain.environment import code_commit
from amltrain.hub.model_folder import public_name
from amltrain.models import model_info

LIBRARIES = ("torch", "accelerate", "transformers", "timm", "datasets", "huggingface_hub")
OF_THIS_MACHINE = ("output", "resume", "hub", "tracking")
OF_THIS_DISK = ("prepared", "refer_root", "image_root", "workers")
OF_THIS_RUN = ("dry_run", "profile", "loader_timeout")


def describe_training(config: RunConfig) -> dict[str, Any]:
    """JSON values: recipe, commit (None outside a git checkout), hardware, versions by library."""
    versions = {name: importlib.metadata.version(name) for name in LIBRARIES}
    return {
        "recipe": recipe(config),
        "commit": code_commit(),
        "hardware": hardware(),
        "versions": {"amltrain": __version__, "python": platform.python_version(), **versions},
    }


def recipe(config: RunConfig) -> dict[str, Any]:
    """The run without what belongs to the machine it ran on. Files appear by name only: paths may be private.

    `data.mask_parts` is written out, since the targets depend on it.
    """
    values = {key: value for key, value in sectioned(config).items() if key not in OF_THIS_MACHINE}
    values["data"] = {key: value for key, value in values["data"].items() if key not in OF_THIS_DISK}
    values["data"]["mask_parts"] = train_mask_parts(config)
    for key in ("vision_weights", "text_weights", "checkpoint"):
        values["model"][key] = _public(values["model"][key])
    values["preprocess"]["tokenizer"] = _public(values["preprocess"]["tokenizer"])
    values["data"]["held_out_ids"] = _public(values["data"]["held_out_ids"])
    for key in OF_THIS_RUN:
        values["train"].pop(key, None)
    return values


def _public(source: str | None) -> str | None:
    return None if source is None else public_name(source)


def train_mask_parts(config: RunConfig) -> MaskParts:
    """Return how the training masks treat overlapping polygons."""
    return config.data.mask_parts or model_info(config.model.name).protocol.mask_parts


@cache
def hardware() -> str:
    """Describe number and type of processes in one phrase."""
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if torch.cuda.is_available():
        return f"{processes} x {torch.cuda.get_device_name()}"
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    name = names[0] if names else platform.processor() or platform.machine()
    return f"{processes} {'process' if processes == 1 else 'processes'} on a CPU ({name}, {os.cpu_count()} cores)"
