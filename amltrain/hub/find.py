"""Find a model by its name: a folder here, a run, or a repository on the HuggingFace Hub.

Nothing here imports torch, so that a command can refuse a wrong name before it imports what it needs for a right one.
"""

import re
from pathlib import Path

from amltrain.errors import UserError, first_line

WEIGHTS_FILE, CONFIG_FILE = "model.safetensors", "config.json"
MODEL_FILES = (WEIGHTS_FILE, "*.json", "*.txt")
"""Patterns of a model folder's files: what goes to the Hub and comes from it."""


def find_model_folder(source: str | Path, revision: str | None = None) -> Path:
    """Find a model's local folder: `source`, its `model/`, a run's `best/model/`, or a Hub repository in the cache.

    A repository may carry its revision: "user/name@v1". An explicit `revision` wins.
    """
    local = Path(source)
    for folder in (local, local / "model", local / "best" / "model"):
        if (folder / CONFIG_FILE).is_file():
            return folder
    if local.exists():
        raise UserError(f"{source} has no {CONFIG_FILE} and no best/model; give a run or a model folder, e.g. RUN/last")
    _refuse_checkpoint(local)
    import huggingface_hub  # only where a name is no folder
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    repo, _, named = str(source).partition("@")
    revision = revision or named or None
    try:
        return Path(huggingface_hub.snapshot_download(repo, revision=revision, allow_patterns=list(MODEL_FILES)))
    except HFValidationError as error:
        raise UserError(f"{source} is neither a folder here nor a Hub repository (user/name)") from error
    except LocalEntryNotFoundError as error:
        raise UserError(
            f"no folder {source} here, and no Hub repository of that name in the cache while the Hub is out of reach; "
            "check the name, the network and HF_HUB_OFFLINE"
        ) from error
    except Exception as error:  # of requests or httpx, depending on huggingface_hub's version
        raise UserError(
            f"no folder {source} here, and the Hub repository of that name could not be read ({first_line(error)}); "
            "check the name, the network and HF_HUB_OFFLINE"
        ) from error


def _refuse_checkpoint(place: Path) -> None:
    """Raise UserError for a checkpoint that its run does not have, with the names of those that are there."""
    models = (path.parent.name for path in place.parent.glob("*/model"))
    present = sorted(name for name in models if re.fullmatch(r"best|last|step-\d+", name))
    if present:
        why = "; the first evaluation makes it" if place.name == "best" else ""
        raise UserError(f"{place.parent} has no checkpoint {place.name}{why}; it has {', '.join(present)}")
