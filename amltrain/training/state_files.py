"""The `state/` folder of a checkpoint: copied from the device, written, and read without running anything in it.

    method.safetensors   the method's tensors that `model/` does not hold (buffers, projections, loss parameters);
                         with weight averaging also the raw weights (`model/` then holds the averaged ones)
    optimizer.bin        optimizer and gradient scaler, read with `weights_only=True`

FSDP and DeepSpeed write their own files instead. `harmless.py` looks at those before they are loaded.
"""

import pickle
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
from amltrain.training.checkpoint import EVALUATED_FILE, TRAINER_FILE
from amltrain.training.harmless import check_harmless

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


def is_own_state(folder: Path) -> bool:
    """Whether one process or DDP wrote this folder: FSDP and DeepSpeed write more files, some under the same names."""
    ours = {METHOD_FILE, OPTIMIZER_FILE, Path(TRAINER_FILE).name, Path(EVALUATED_FILE).name}
    return {path.name for path in folder.iterdir()} <= ours


def load_engine_state(checkpoint: Path, accelerator: Accelerator, ema: AveragedModel | None) -> None:
    """Load what FSDP or DeepSpeed wrote; every process calls. Raises UserError for files that hold code."""
    folder = checkpoint / "state"
    check_harmless(folder)
    accelerator.load_state(str(folder))
    if ema is not None:
        ema.module.load_state_dict(read_weights(checkpoint / "model"))
        ema.n_averaged.copy_(_read_tensors(folder / METHOD_FILE)[AVERAGED])


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
