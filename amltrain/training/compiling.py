"""torch.compile in bounded time: only the blocks that a model repeats are compiled.

A whole step is one graph of thousands of operators, whose kernels take very long to build. A model is mostly blocks of
a few kinds, each of which is compiled once for every shape that it gets; the rest runs as it is. Shapes are static:
tracing a window partition with unknown sizes costs more than tracing it again for every stage.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

LEAST_LAYERS = 4
"""Layers with parameters that a block has; a smaller one has nothing to fuse."""
VERSIONS = 64
"""Versions of one kind of block: stages of several widths, with and without a shift, at both sizes of AML."""


def repeated_blocks(module: nn.Module) -> Iterator[nn.Module]:
    """Yield the innermost blocks that stand in a list with another of their own class."""
    kinds = [type(child) for child in module.children()]
    for child in module.children():
        inner = list(repeated_blocks(child))
        repeated = isinstance(module, (nn.ModuleList, nn.Sequential)) and kinds.count(type(child)) > 1
        yield from inner or ([child] if repeated and _layers(child) >= LEAST_LAYERS else [])


def compile_blocks(module: nn.Module, backend: str = "inductor") -> int:
    """Compile the repeated blocks in place, which keeps names, hooks and wrappers; return how many there are."""
    torch._dynamo.config.recompile_limit = max(VERSIONS, torch._dynamo.config.recompile_limit)
    blocks = list(repeated_blocks(module))
    for block in blocks:
        block.compile(backend=backend, dynamic=False)
    return len(blocks)


@contextmanager
def uncompiled() -> Iterator[None]:
    """Run compiled blocks as they are: an evaluation has other modes and batches, which would be compiled as well."""
    with torch.compiler.set_stance("force_eager"):
        yield


def _layers(module: nn.Module) -> int:
    return sum(1 for part in module.modules() if next(part.parameters(recurse=False), None) is not None)
