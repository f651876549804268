"""The --device of the command lines."""

import torch

from amltrain.errors import UserError


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
