"""Official key names to ours: renaming rules in, a `Conversion` that leaves no key unexplained out."""

import re
from collections.abc import Mapping, Sequence

from torch import Tensor

from amltrain.errors import UserError
from amltrain.models.base import Conversion


def convert(
    official: Mapping[str, Tensor],
    own: Mapping[str, Tensor],
    *,
    renames: Sequence[tuple[str, str]] = (),
    drops: Sequence[tuple[str, str]] = (),
) -> Conversion:
    """Apply every renaming rule, in order, to every official key.

    own      this model's state dict: which keys exist and in which shapes
    renames  (regular expression, replacement) as in re.sub
    drops    (regular expression that matches a whole official key, why it has no place here)

    A 1x1 convolution's weight [out, in, 1] or [out, in, 1, 1] fits a linear layer's [out, in].
    Raises UserError when a tensor's shape does not fit.
    """
    state: dict[str, Tensor] = {}
    renamed: dict[str, str] = {}
    dropped: dict[str, str] = {}
    unmatched: list[str] = []
    for key, tensor in official.items():
        reason = next((why for pattern, why in drops if re.fullmatch(pattern, key)), None)
        if reason is not None:
            dropped[key] = reason
            continue
        name = key
        for pattern, replacement in renames:
            name = re.sub(pattern, replacement, name)
        if name in own:
            state[name] = _shaped(tensor, own[name], key, name)
            renamed[key] = name
        else:
            unmatched.append(key)
    return Conversion(state, renamed, dropped, unmatched, missing=[name for name in own if name not in state])


def _shaped(tensor: Tensor, like: Tensor, key: str, name: str) -> Tensor:
    shape = tuple(tensor.shape)
    while len(shape) > max(like.ndim, 2) and shape[-1] == 1:
        shape = shape[:-1]
    if shape != tuple(like.shape):
        raise UserError(
            f"{key} has shape {list(tensor.shape)}, this model's {name} has {list(like.shape)}; "
            "convert into the model and sizes that the file was trained with"
        )
    return tensor.reshape(shape)
