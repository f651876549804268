"""Native code of others: used only where it is there or asked for, and equal to the plain computation.

`AMLTRAIN_HUB_KERNELS=1` lets the `kernels` package download compiled code from the Hub and run it. What is found is
compared with the plain computation on the device, gradients included, before its first use. Training depends on none of
it: a download, a missing build or a difference is one warning.
"""

import os
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch

from amltrain.errors import first_line

ASKED = "AMLTRAIN_HUB_KERNELS"
"""Environment variable that is 1 where the Hub's native code may be downloaded and run."""
TOLERANCE = 1e-3
"""Largest difference from the plain computation, relative to the largest value: another order of float32 sums."""
Function = TypeVar("Function", bound=Callable[..., Any])


class HubKernel(NamedTuple):
    """A repository of compiled code, and the version of its interface that this project knows."""

    repository: str
    version: int


def is_asked(device: torch.device) -> bool:
    """Whether the Hub's code may be used on this device."""
    return device.type == "cuda" and os.environ.get(ASKED) == "1"


def load(kernel: HubKernel) -> Any:
    """The kernel's module, downloaded where it is not cached. Raises whatever the `kernels` package raises."""
    from kernels import get_kernel

    return get_kernel(kernel.repository, version=kernel.version)  # since 0.15 there is none without a version


def equal_or_none(name: str, make: Callable[[], Function], difference: Callable[[Function], float]) -> Function | None:
    """What `make` returns if it can be made and is equal, else None with a warning.

    difference: of its outputs and gradients from the plain computation's, relative to their largest value.
    """
    try:
        made = make()
        with torch.inference_mode(False), torch.enable_grad():  # the first use may be in an evaluation
            found = difference(made)
    except Exception as error:  # a download, a missing build or a launch: training must not depend on any of them
        warnings.warn(f"{name} is not used: {first_line(error)}", stacklevel=2)
        return None
    if not found <= TOLERANCE:
        warnings.warn(f"{name} is not used: it differs by {found:.1e}", stacklevel=2)
        return None
    return made
