"""Gradient checkpointing of a module with batch norms."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint


@contextmanager
def _running_statistics_kept(norms: list[_BatchNorm]) -> Iterator[None]:
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
            if norm.num_batches_tracked is not None:
                norm.num_batches_tracked.sub_(1)


def recompute(module: nn.Module, *inputs: Any) -> Any:
    """`module(*inputs)`, computed again in the backward pass instead of kept.

    Running statistics move once, in the first computation; plain checkpointing would move them twice. The non-reentrant
    kind, which DDP and compile need.
    """
    norms = [m for m in module.modules() if isinstance(m, _BatchNorm) and m.training and m.track_running_stats]

    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), _running_statistics_kept(norms)

    return checkpoint(module, *inputs, use_reentrant=False, context_fn=contexts)
