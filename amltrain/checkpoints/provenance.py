"""Record where weights came from: recipe, code, libraries, hardware. The model card shows it."""

from typing import Any

from amltrain.config.schema import MaskParts, RunConfig, sectioned
from amltrain.environment import code_commit, hardware, library_versions
from amltrain.hub.model_folder import public_name
from amltrain.models import model_info

OF_THIS_MACHINE = ("output", "resume", "hub", "tracking")
OF_THIS_DISK = ("prepared", "refer_root", "image_root", "workers")
OF_THIS_RUN = ("dry_run", "profile", "loader_timeout")


def describe_training(config: RunConfig) -> dict[str, Any]:
    """JSON values: recipe, commit (None outside a git checkout), hardware, versions by library."""
    return {
        "recipe": recipe(config),
        "commit": code_commit(),
        "hardware": hardware(),
        "versions": library_versions(),
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
