"""Describe the machine."""

import os
import platform
from typing import Any

import torch

from amltrain.data.prepare import available_cores
from amltrain.environment import choose_device, processor_name


def describe(*, device: str) -> dict[str, Any]:
    """Name, memory, cores and versions. Raises UserError for a device that is not there."""
    chosen = choose_device(device)
    processor = processor_name()
    facts: dict[str, Any] = {
        "name": processor,
        "cpu": processor,
        "cores": available_cores(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {os.uname().machine}",
    }
    if chosen.type == "cuda":
        card = torch.cuda.get_device_properties(chosen)
        facts |= {"name": card.name, "memory": card.total_memory, "cuda": torch.version.cuda}
    return facts
