"""What of a built model trains: modules that are frozen, and modules that learn by low-rank updates, by name.

`create_model(name, freeze=[...], lora={...})` takes both for every model; a model folder keeps them with its other
arguments. `depths_of` counts the blocks of pretrained encoders, for learning rates that fall towards the input.
"""

from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from amltrain.errors import UserError, fits, unknown_name
from amltrain.models.base import RISModel
from amltrain.models.layers.basic import tune


def apply_tuning(model: RISModel, freeze: Any, lora: Any) -> RISModel:
    """Freeze and adapt modules in place.

    freeze: patterns of module names, such as "text" or "vision.layers.[01]"; what they match keeps its weights and
    stays in evaluation mode. lora: pattern -> rank; the linear layers of what it matches get updates of that rank, and
    keep their weights. Raises UserError for a pattern that matches nothing.
    """
    if not isinstance(freeze, (list, tuple)) or not all(isinstance(pattern, str) for pattern in freeze):
        raise UserError(f"model.freeze is {freeze!r}, not a list of module names")
    if not isinstance(lora, Mapping) or not all(
        fits(p, str) and fits(rank, int) and rank > 0 for p, rank in lora.items()
    ):
        raise UserError(f"model.lora is {lora!r}; give names of modules and ranks, such as {{text: 16}}")
    for pattern in freeze:
        for name in matching(model, pattern, "model.freeze"):
            model.get_submodule(name).requires_grad_(False)
            model.frozen_modules = (*model.frozen_modules, name)
    for pattern, rank in lora.items():
        for name in matching(model, pattern, "model.lora"):
            tune(model.get_submodule(name), "lora", rank)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise UserError("model.freeze leaves nothing to train; name fewer modules")
    model.train(model.training)
    return model


def matching(model: nn.Module, pattern: str, key: str) -> list[str]:
    """Names of the modules that a pattern matches, the outermost only. Raises UserError if there are none."""
    names = [name for name, _ in model.named_modules() if name]
    found = [name for name in names if fnmatchcase(name, pattern)]
    if not found:
        raise unknown_name(f"module ({key})", pattern, names)
    return [name for name in found if not any(name.startswith(f"{other}.") for other in found)]


def depths_of(model: RISModel) -> Iterator[tuple[dict[int, int], int]]:
    """For every encoder: id of a trained parameter -> depth, and the depth of what stands behind its last block.

    Depth 0 is what stands before the first block (embeddings), 1 the first block. Parameters between two blocks have
    the depth of the first of them. Source: the rule of BEiT and MAE, as in timm.
    """
    for name in model.encoders:
        encoder = model.get_submodule(name)
        blocks = list(repeated_blocks(encoder))
        place = {id(parameter): i for i, block in enumerate(blocks, 1) for parameter in block.parameters()}
        depths, depth = {}, 0
        for parameter in encoder.parameters():
            depth = place.get(id(parameter), depth if depth < len(blocks) else len(blocks) + 1)
            if parameter.requires_grad:
                depths[id(parameter)] = depth
        yield depths, len(blocks) + 1


def repeated_blocks(module: nn.Module) -> Iterator[nn.Module]:
    """Yield the innermost blocks that stand in a list with another of their own class."""
    kinds = [type(child) for child in module.children()]
    for child in module.children():
        inner = list(repeated_blocks(child))
        repeated = isinstance(module, (nn.ModuleList, nn.Sequential)) and kinds.count(type(child)) > 1
        yield from inner or ([child] if repeated and _layers(child) >= LEAST_LAYERS else [])


LEAST_LAYERS = 4
"""Layers with parameters that a block has; a smaller one has nothing to fuse."""


def _layers(module: nn.Module) -> int:
    return sum(1 for part in module.modules() if next(part.parameters(recurse=False), None) is not None)
