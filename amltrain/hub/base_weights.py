"""What a checkpoint may leave out: frozen parameters, which come from weights that the run names.

    base.json   in the model folder: where they come from, their names, and the SHA-256 of their values

A language model of 7.7 G parameters trains 0.3 G of them; its checkpoints then have 4 % of the size. Whoever loads such
a folder builds the model from the same weights again, and their hash is compared first.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from amltrain.errors import UserError, first_line
from amltrain.files import write_text

BASE_FILE = "base.json"
SOURCES = ("vision_weights", "text_weights", "checkpoint")
"""Keys of `model` that name weights."""


class Base(NamedTuple):
    """Frozen parameters by name, where they come from (keys of SOURCES), and what identifies their values."""

    sources: dict[str, str]
    names: frozenset[str]
    sha256: str

    def write(self, folder: Path) -> None:
        """Write base.json. Raises OSError."""
        content = {"sources": self.sources, "sha256": self.sha256, "names": sorted(self.names)}
        write_text(folder / BASE_FILE, json.dumps(content, indent=1) + "\n")

    def check(self, model: nn.Module, folder: Path) -> dict[str, Tensor]:
        """The frozen parameters of a model that was built from the sources. Raises UserError if they are others."""
        own = {name: tensor for name, tensor in model.state_dict().items() if name in self.names}
        told = ", ".join(f"{key} {source}" for key, source in self.sources.items())
        if len(own) < len(self.names) or fingerprint(own) != self.sha256:
            raise UserError(
                f"{folder} leaves out {len(self.names)} frozen parameters, and those of {told} are not the ones that "
                f"it was trained with; get the revision that the run started from"
            )
        return own


def find_base(model: nn.Module, sources: Mapping[str, str | None]) -> Base:
    """The frozen parameters of a model whose weights are whole. Raises UserError where nothing says what they are."""
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    named = {key: source for key, source in sources.items() if key in SOURCES and source is not None}
    if not frozen:
        raise UserError("checkpoint.frozen=left_out: this model has no frozen parameters; leave the key out")
    if not named:
        raise UserError(
            "checkpoint.frozen=left_out needs weights that are there again later; name them by model.vision_weights, "
            "model.text_weights or model.checkpoint, or leave the key out"
        )
    state = model.state_dict()
    return Base(named, frozenset(frozen), fingerprint({name: state[name] for name in frozen}))


def read_base(folder: Path) -> Base | None:
    """What a model folder leaves out; None if it is whole. Raises UserError for a damaged file."""
    path = folder / BASE_FILE
    if not path.exists():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        sources, names, sha256 = content["sources"], content["names"], content["sha256"]
        texts = [*sources, *sources.values(), *names, sha256]
        if not set(sources) <= set(SOURCES) or not all(isinstance(text, str) for text in texts):
            raise ValueError("it has other entries than sources, names and sha256")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path} cannot be read ({first_line(error)}); copy or download the folder again") from error
    return Base(dict(sources), frozenset(names), sha256)


def fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of tensors: names, types, shapes and values."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
