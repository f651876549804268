"""torch.compile in bounded time: only the blocks that a model repeats are compiled.

A whole step is one graph of thousands of operators, whose kernels take minutes to hours to build. A model is mostly
blocks of a few kinds; each kind is compiled once for every shape that it gets and the rest of the model runs as it is.
"""

from collections.abc import Iterator

import torch
from torch import nn

RECOMPILATIONS = 64
"""Versions of one kind of block: stages of several widths, with and without a shift, in training and in evaluation."""


def repeated_blocks(module: nn.Module) -> Iterator[nn.Module]:
    """Yield the innermost modules that stand in a list of several of their own class."""
    for child in module.children():
        inner = list(repeated_blocks(child))
        alike = isinstance(module, nn.ModuleList) and len(module) > 1 and {type(m) for m in module} == {type(child)}
        yield from inner or ([child] if alike else [])


def compile_blocks(module: nn.Module, backend: str = "inductor") -> int:
    """Compile the repeated blocks in place, which keeps names, hooks and wrappers; return how many there are."""
    torch._dynamo.config.recompile_limit = max(RECOMPILATIONS, torch._dynamo.config.recompile_limit)
    blocks = [block for block in repeated_blocks(module) if next(block.parameters(), None) is not None]
    for block in blocks:
        block.compile(backend=backend)
    return len(blocks)
