"""Eval mode for a while."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def eval_mode(model: Any) -> Iterator[None]:
    """Put every module in eval mode, then back in its own mode: frozen encoders may have been in eval mode before.

    A plain function is accepted too, and left alone.
    """
    modes = [(module, module.training) for module in model.modules()] if isinstance(model, nn.Module) else []
    try:
        for module, _ in modes:
            module.training = False
        yield
    finally:
        for module, mode in modes:
            module.training = mode
