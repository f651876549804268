"""The `state/` folder of a checkpoint: copied from the device, written, and read without running anything in it.

    method.safetensors   the method's tensors that `model/` does not hold (buffers, projections, loss parameters);
                         with weight averaging also the raw weights (`model/` then holds the averaged ones)
    optimizer.bin        optimizer and gradient scaler, read with `weights_only=True`

FSDP and DeepSpeed write their own files instead. `check_harmless` looks at those before they are loaded.
"""

import pickle
import re
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel

from amltrain.errors import UserError, first_line
from amltrain.hub.model_folder import read_weights

METHOD_FILE, OPTIMIZER_FILE = "method.safetensors", "optimizer.bin"
AVERAGED = "ema.n_averaged"
MODEL = "model."


class Snapshot(NamedTuple):
    """A training state in CPU memory that later steps do not change.

    weights: the model to export, averaged if the run averages; method, optimizer: contents of the two state files.
    """

    weights: dict[str, Tensor]
    method: dict[str, Tensor]
    optimizer: dict[str, Any]


def take_snapshot(
    method: nn.Module, optimizer: Optimizer, scaler: torch.amp.GradScaler | None, ema: AveragedModel | None
) -> Snapshot:
    """Copy a training state. method: unwrapped, with whole weights."""
    state = method.state_dict()
    model = {key.removeprefix(MODEL): tensor for key, tensor in state.items() if key.startswith(MODEL)}
    rest = {key: tensor for key, tensor in state.items() if not key.startswith(MODEL)}
    if ema is not None:
        rest = {**state, AVERAGED: ema.n_averaged}
        model = ema.module.state_dict()
    scaler_state = None if scaler is None else scaler.state_dict()
    return Snapshot(_copy(model), _copy(rest), _copy({"optimizer": optimizer.state_dict(), "scaler": scaler_state}))


def write_state(folder: Path, snapshot: Snapshot) -> None:
    """Write the two state files."""
    save_file({key: tensor.contiguous() for key, tensor in snapshot.method.items()}, folder / METHOD_FILE)
    torch.save(snapshot.optimizer, folder / OPTIMIZER_FILE)


def write_averaged(folder: Path, ema: AveragedModel) -> None:
    """Write how many steps a weight average holds; for engines that write the rest of the state themselves."""
    save_file({AVERAGED: ema.n_averaged.detach().cpu()}, folder / METHOD_FILE)


def load_state(
    checkpoint: Path,
    method: nn.Module,
    optimizer: Optimizer,
    scaler: torch.amp.GradScaler | None,
    ema: AveragedModel | None,
) -> None:
    """Load what `write_state` wrote and the weights of `model/`. Raises UserError for files that are damaged."""
    state, exported = _read_tensors(checkpoint / "state" / METHOD_FILE), read_weights(checkpoint / "model")
    averaged = state.pop(AVERAGED, None)
    if averaged is None:
        state |= {f"{MODEL}{key}": tensor for key, tensor in exported.items()}
    with _damage_named(checkpoint):
        method.load_state_dict(state)
        if ema is not None:
            if averaged is None:
                raise UserError(f"{checkpoint} has no averaged weights; leave train.ema_decay out")
            ema.module.load_state_dict(exported)
            ema.n_averaged.copy_(averaged)
        path = checkpoint / "state" / OPTIMIZER_FILE
        content = torch.load(path, map_location="cpu", weights_only=True)
        # how the optimizer computes belongs to this machine, not to the one that saved
        own = [{key: group.get(key) for key in ("fused", "foreach")} for group in optimizer.param_groups]
        optimizer.load_state_dict(content["optimizer"])
        for group, kept in zip(optimizer.param_groups, own, strict=True):
            group.update(kept)
        if scaler is not None and content["scaler"] is not None:
            scaler.load_state_dict(content["scaler"])


def load_engine_state(checkpoint: Path, accelerator: Accelerator, ema: AveragedModel | None) -> None:
    """Load what FSDP or DeepSpeed wrote; every process calls. Raises UserError for files that hold code."""
    folder = checkpoint / "state"
    check_harmless(folder)
    accelerator.load_state(str(folder))
    if ema is not None:
        ema.module.load_state_dict(read_weights(checkpoint / "model"))
        ema.n_averaged.copy_(_read_tensors(folder / METHOD_FILE)[AVERAGED])


def check_harmless(folder: Path) -> None:
    """Raise UserError if a pickle under `folder` names anything but plain data of torch, numpy and DeepSpeed.

    DeepSpeed and torch.distributed.checkpoint would run it. Nothing is executed here.
    """
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        if path.suffix in (".json", ".safetensors", ".py") or path.name == "latest":  # nothing unpickles these
            continue
        names = _names_in_pickle(path)
        bad = sorted(name for name in names if not _is_plain(name))
        if bad:
            raise UserError(f"{path} would run {bad[0]} and was not loaded; resume from another checkpoint")


_PLAIN = re.compile(
    r"collections\.(OrderedDict|defaultdict)|builtins\.(dict|list|set|int|float|complex|bytearray)|_codecs\.encode"
    r"|torch\.(Size|device|Tensor|[a-z]+\d*(_e\d\w*)?|\w+Storage)|torch\.storage\.(Untyped|Typed)Storage"
    r"|torch\._utils\._rebuild_\w+|torch\._tensor\._rebuild_from_type_v2|torch\.nn\.parameter\.Parameter|torch\.torch_version\.TorchVersion"
    r"|torch\.serialization\._get_layout|numpy\.(dtype|ndarray)|numpy\.(_core|core)\.multiarray\.(_reconstruct|scalar)"
    r"|numpy\.dtypes\.\w+DType|pathlib\.(_local\.)?(PosixPath|PurePosixPath)"
    r"|torch\.distributed\.checkpoint\.metadata\.(Metadata|MetadataIndex|StorageMeta|TensorProperties|_MEM_FORMAT_ENCODING"
    r"|(Chunk|Tensor|Bytes)StorageMetadata)|torch\.distributed\.checkpoint\.filesystem\._StorageInfo"
    r"|deepspeed\.runtime\.fp16\.loss_scaler\.(Dynamic)?LossScaler|deepspeed\.runtime\.zero\.config\.ZeroStageEnum"
    r"|deepspeed\.utils\.tensor_fragment\.fragment_address"
)
"""Classes and functions that only hold or build plain data."""


def _is_plain(name: str) -> bool:
    if name.startswith("torch.") and name.count(".") == 1 and name[6:].islower():
        return isinstance(getattr(torch, name[6:], None), torch.dtype) or name == "torch.device"
    return _PLAIN.fullmatch(name) is not None


class _Names(pickle._Unpickler):
    """Collects what a pickle would import, and builds inert objects in its place."""

    def __init__(self, file: Any) -> None:
        super().__init__(file)
        self.names: set[str] = set()

    def find_class(self, module: str, name: str) -> Any:
        self.names.add(f"{module}.{name}")
        return _Inert

    def persistent_load(self, pid: Any) -> Any:
        return _Inert()

    def get_extension(self, code: int) -> None:
        raise pickle.UnpicklingError("extension registry")


class _Inert(dict):
    """Accept any operation of a pickle on an object, and do nothing."""

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        super().__init__()

    def __hash__(self) -> int:  # type: ignore[override]  # a dict has none
        return id(self)

    def __setstate__(self, state: Any) -> None:
        pass

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def append(self, item: Any) -> None:
        pass

    def extend(self, items: Any) -> None:
        pass

    def add(self, item: Any) -> None:
        pass


def _names_in_pickle(path: Path) -> set[str]:
    """Everything that the pickles in a file would import: a zip file of torch.save, or pickles one after another."""
    names: set[str] = set()
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                for entry in archive.namelist():
                    if entry.endswith(".pkl"):
                        with archive.open(entry) as file:
                            names |= _read_names(file)
            return names
        with path.open("rb") as file:
            return _read_names(file)
    except Exception as error:  # a file that is not a pickle raises almost anything
        raise UserError(f"{path} is damaged ({first_line(error)}); resume from another checkpoint") from error


def _read_names(file: Any) -> set[str]:
    reader = _Names(file)
    reader.load()
    return reader.names


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"{path} is missing or damaged ({first_line(error)}); resume from another checkpoint"
        ) from error


@contextmanager
def _damage_named(checkpoint: Path) -> Iterator[None]:
    """Turn a library's error about a file's content into a UserError; a pickle that holds code is one of them."""
    try:
        yield
    except (OSError, RuntimeError, ValueError, KeyError, TypeError, AttributeError, EOFError,
            pickle.UnpicklingError) as error:  # fmt: skip
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"{checkpoint / 'state'} does not fit this run or is damaged ({first_line(error)}); resume from another "
            f"checkpoint"
        ) from error


def _copy(value: Any) -> Any:
    """A copy in CPU memory of nested dicts, lists and tuples of tensors and plain values."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: _copy(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_copy(entry) for entry in value)
    return value
