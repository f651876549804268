"""The tensors of a TorchScript archive (OpenAI's CLIP files) without running the code in it.

`torch.jit.load` would compile and run the archive, `torch.load(weights_only=True)` refuses it. The archive is a zip:
`data.pkl` describes the module tree, `data/N` are raw storages. An unpickler that admits that description and nothing
else reads it; the archive's own classes become bare holders of attributes.
"""

import collections
import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from amltrain.errors import UserError, first_line

_DTYPES = {
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "DoubleStorage": torch.float64,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}


class _Holder:
    """Stands for any object of the archive's own classes: its attributes, no behaviour."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)


def _tensor(storage: Tensor, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any) -> Tensor:
    return storage.as_strided(size, stride, offset).clone()


def _first(value: Any, *_: Any) -> Any:
    return value


class _Unpickler(pickle.Unpickler):
    """Admits module descriptions, tensors and TorchScript's typed lists."""

    def __init__(self, archive: zipfile.ZipFile, root: str) -> None:
        super().__init__(archive.open(f"{root}/data.pkl"))
        self.archive, self.root = archive, root

    def find_class(self, module: str, name: str) -> Any:
        if module.startswith("__torch__"):
            return _Holder
        if module == "torch" and name in _DTYPES:
            return _DTYPES[name]
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _tensor
        if (module, name) == ("collections", "OrderedDict"):
            return collections.OrderedDict
        if module == "torch.jit._pickle":  # restore_type_tag(value, type), build_intlist(list), ...
            return _first
        raise pickle.UnpicklingError(f"{module}.{name} does not belong to a module description")

    def persistent_load(self, pid: Any) -> Tensor:
        kind, dtype, key, *_ = pid
        if kind != "storage" or not isinstance(dtype, torch.dtype):
            raise pickle.UnpicklingError(f"unknown record {kind!r}")
        content = bytearray(self.archive.read(f"{self.root}/data/{key}"))
        return torch.frombuffer(content, dtype=dtype) if content else torch.empty(0, dtype=dtype)


def is_torchscript(path: Path) -> bool:
    """Whether a file is a TorchScript archive; plain `torch.save` files have no constants record."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def read_torchscript(path: Path) -> dict[str, Tensor]:
    """Parameters and buffers of the archived module by dotted name, as its `state_dict()` would give them.

    Raises UserError for a file that is damaged or holds anything but a module.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            root = next(name for name in archive.namelist() if name.endswith("/data.pkl")).rsplit("/", 1)[0]
            module = _Unpickler(archive, root).load()
    except pickle.UnpicklingError as error:
        raise UserError(f"{path} holds more than a module's weights, and is not read: {error}") from error
    except Exception as error:  # a damaged archive can raise almost anything
        raise UserError(
            f"{path} is damaged or no TorchScript archive ({first_line(error)}); download it again"
        ) from error
    return dict(_tensors(module, ""))


def _tensors(holder: Any, prefix: str) -> list[tuple[str, Tensor]]:
    found = []
    for name, value in vars(holder).items():
        if isinstance(value, Tensor):
            found.append((prefix + name, value))
        elif isinstance(value, _Holder):
            found += _tensors(value, f"{prefix}{name}.")
    return found
