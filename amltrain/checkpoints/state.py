"""The `state/` folder of a checkpoint: safetensors and JSON, written and read without running anything in it.

    method.safetensors       the method's tensors that `model/` does not contain (buffers, projections, parameters of
                             the loss); with weight averaging also the raw weights, as `model/` has averaged ones
    optimizer.safetensors    tensors of the optimizer, "PARAMETER/exp_avg"
    optimizer.json           its groups and numbers, and the gradient scaler
    rank-00001-of-00004.safetensors
                             FSDP2 instead of the first two: the rows that this process owns of every tensor of the
                             method ("method/KEY") and of the optimizer ("optimizer/PARAMETER/exp_avg")

Both forms contain the same tensors, so one process, DDP and FSDP2 resume from each other at any number of processes.
DeepSpeed writes its own files; they are read as plain data (`weights_only=True`), on as many processes.
"""

import json
import pickle
from collections.abc import Iterator, Mapping, Set
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel

from amltrain.errors import UserError, first_line
from amltrain.hub.model_folder import read_weights
from amltrain.run_folder import MODEL, STATE

METHOD_FILE, OPTIMIZER_FILE, OPTIMIZER_JSON = "method.safetensors", "optimizer.safetensors", "optimizer.json"
OLD_OPTIMIZER_FILE = "optimizer.bin"
"""Of version 0.1: a pickle, read with `weights_only=True`."""
AVERAGED = "ema.n_averaged"
PREFIX = "model."
DAMAGE = (OSError, RuntimeError, ValueError, KeyError, TypeError, AttributeError, IndexError, EOFError,
          SafetensorError, pickle.UnpicklingError)  # fmt: skip
"""What libraries raise for content of a file that does not fit."""


class Snapshot(NamedTuple):
    """A training state in CPU memory that later steps do not change.

    weights: the model to export, averaged if the run averages. The others: contents of the three state files.
    """

    weights: dict[str, Tensor]
    method: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    numbers: dict[str, Any]


def take_snapshot(
    method: nn.Module,
    optimizer: Optimizer,
    scaler: torch.amp.GradScaler | None,
    ema: AveragedModel | None,
    left_out: Set[str] = frozenset(),
) -> Snapshot:
    """Copy a training state. method: unwrapped, with whole weights. left_out: names of the model's not to copy."""
    state = {key: tensor for key, tensor in method.state_dict().items() if key.removeprefix(PREFIX) not in left_out}
    model = {key.removeprefix(PREFIX): tensor for key, tensor in state.items() if key.startswith(PREFIX)}
    rest = {key: tensor for key, tensor in state.items() if not key.startswith(PREFIX)}
    if ema is not None:
        rest = {**state, AVERAGED: ema.n_averaged}
        model = {key: tensor for key, tensor in ema.module.state_dict().items() if key not in left_out}
    tensors, numbers = split_optimizer(method, optimizer, scaler)
    return Snapshot(copied(model), copied(rest), copied(tensors), numbers)


def split_optimizer(
    method: nn.Module, optimizer: Optimizer, scaler: torch.amp.GradScaler | None
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return an optimizer's tensors by "PARAMETER/NAME", and the rest of its state as JSON values."""
    names = {id(parameter): name for name, parameter in method.named_parameters()}
    tensors: dict[str, Tensor] = {}
    values: dict[str, dict[str, Any]] = {}
    groups = []
    for group in optimizer.param_groups:
        groups.append({key: _plain(value) for key, value in group.items() if key != "params"})
        groups[-1]["params"] = [names[id(parameter)] for parameter in group["params"]]
        for parameter in group["params"]:
            name = names[id(parameter)]
            for key, value in optimizer.state.get(parameter, {}).items():
                if isinstance(value, Tensor):
                    tensors[f"{name}/{key}"] = value
                else:
                    values.setdefault(name, {})[key] = value
    scaler_state = None if scaler is None else scaler.state_dict()
    numbers = {"groups": groups, "values": values, "scaler": scaler_state, "tensors": sorted(tensors)}
    return tensors, json.loads(json.dumps(numbers))


def _plain(value: Any) -> Any:
    """A value of a parameter group for JSON; some of timm's optimizers keep a number there as a tensor."""
    return {"tensor": value.tolist(), "dtype": str(value.dtype)} if isinstance(value, Tensor) else value


def _restored(value: Any, device: torch.device) -> Any:
    """What `_plain` wrote."""
    if isinstance(value, dict) and value.keys() == {"tensor", "dtype"}:
        return torch.tensor(value["tensor"], dtype=getattr(torch, value["dtype"].removeprefix("torch.")), device=device)
    return value


def write_state(folder: Path, snapshot: Snapshot) -> None:
    """Write the three state files of one process or DDP."""
    save_file({key: tensor.contiguous() for key, tensor in snapshot.method.items()}, folder / METHOD_FILE)
    save_file({key: tensor.contiguous() for key, tensor in snapshot.optimizer.items()}, folder / OPTIMIZER_FILE)
    write_numbers(folder, snapshot.numbers)


def write_numbers(folder: Path, numbers: dict[str, Any]) -> None:
    """Write optimizer.json."""
    (folder / OPTIMIZER_JSON).write_text(json.dumps(numbers, indent=1), encoding="utf-8")


def write_averaged(folder: Path, ema: AveragedModel) -> None:
    """Write how many steps a weight average has seen; for engines that write the rest of the state themselves."""
    save_file({AVERAGED: ema.n_averaged.detach().cpu()}, folder / METHOD_FILE)


def take_rows(
    method: nn.Module, optimizer: Optimizer, rank: int, left_out: Set[str] = frozenset()
) -> dict[str, Tensor]:
    """Copy what this process owns of a method that FSDP2 shards; what is not sharded belongs to rank 0.

    left_out: names of the model's not to copy.
    """
    tensors, _ = split_optimizer(method, optimizer, None)
    kept = {key: tensor for key, tensor in method.state_dict().items() if key.removeprefix(PREFIX) not in left_out}
    every = {f"method/{key}": tensor for key, tensor in kept.items()}
    every |= {f"optimizer/{key}": tensor for key, tensor in tensors.items()}
    rows = {}
    for key, tensor in every.items():
        if isinstance(tensor, DTensor):
            start, stop = owned_rows(tensor)
            if stop > start:
                rows[key] = tensor.to_local()
        elif rank == 0:
            rows[key] = tensor
    return copied(rows)


def rank_file(folder: Path, rank: int, processes: int) -> Path:
    """The file of one process's rows."""
    return folder / f"rank-{rank:05d}-of-{processes:05d}.safetensors"


def owned_rows(tensor: DTensor) -> tuple[int, int]:
    """First row, and the one after the last, that this process owns of a tensor sharded over its first dimension."""
    if tensor.device_mesh.ndim != 1 or tuple(tensor.placements) != (Shard(0),):
        raise UserError(f"a tensor is sharded as {tensor.placements}; only FSDP2's sharding by rows can be saved")
    processes, rank = tensor.device_mesh.size(), tensor.device_mesh.get_local_rank()
    share = -(-tensor.shape[0] // processes)  # as torch.chunk, which FSDP2 uses
    return min(rank * share, tensor.shape[0]), min((rank + 1) * share, tensor.shape[0])


class SavedState:
    """The tensors of a checkpoint's state by key ("method/KEY", "optimizer/PARAMETER/NAME"), read by rows."""

    def __init__(self, checkpoint: Path) -> None:
        """Look at the headers of the files alone. Raises UserError for files that are missing or damaged."""
        self.checkpoint, folder = checkpoint, checkpoint / STATE
        self._places: dict[str, list[tuple[Path, str, list[int]]]] = {}
        with damage_named(checkpoint):
            ranks = sorted(folder.glob("rank-*-of-*.safetensors"))
            for number, path in enumerate(ranks):
                if path != rank_file(folder, number, len(ranks)):
                    raise UserError(f"{folder} lacks files of some processes; resume from another checkpoint")
                self._add(path, "")
            if not ranks:
                self._add(checkpoint / MODEL / "model.safetensors", f"method/{PREFIX}")
                self._add(folder / METHOD_FILE, "method/")  # after the model's: with an average it has the raw weights
                if not (folder / OLD_OPTIMIZER_FILE).is_file() or (folder / OPTIMIZER_JSON).is_file():
                    self._add(folder / OPTIMIZER_FILE, "optimizer/")
            self.numbers: dict[str, Any] | None = None
            if (folder / OPTIMIZER_JSON).is_file():
                self.numbers = json.loads((folder / OPTIMIZER_JSON).read_text(encoding="utf-8"))

    def _add(self, path: Path, prefix: str) -> None:
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 - not a dict
                place = (path, key, file.get_slice(key).get_shape())
                if prefix:
                    self._places[prefix + key] = [place]
                else:
                    self._places.setdefault(key, []).append(place)

    def keys(self, prefix: str) -> list[str]:
        """Keys that start so, without that start."""
        return [key.removeprefix(prefix) for key in self._places if key.startswith(prefix)]

    def rows(self, key: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Read rows `start` to `stop` (None: all) of a tensor, in CPU memory."""
        parts: list[Tensor] = []
        first = 0
        for path, name, shape in self._places[key]:
            if not shape:
                return load_one(path, name)
            last = first + shape[0]
            low, high = max(start, first), last if stop is None else min(stop, last)
            if low < high or (shape[0] == 0 and not parts):
                with safe_open(path, framework="pt") as file:
                    parts.append(file.get_slice(name)[low - first : high - first])
            first = last
        if stop is not None and stop > first:
            raise UserError(f"{self.checkpoint}: {key} has {first} rows, this run needs {stop}")
        if not parts:
            path, name, shape = self._places[key][0]
            return load_one(path, name)[:0]
        return parts[0] if len(parts) == 1 else torch.cat(parts)


def load_one(path: Path, name: str) -> Tensor:
    """Read one tensor of a safetensors file."""
    with safe_open(path, framework="pt") as file:
        return file.get_tensor(name)


def load_state(
    checkpoint: Path,
    method: nn.Module,
    optimizer: Optimizer,
    scaler: torch.amp.GradScaler | None,
    ema: AveragedModel | None,
    left_out: Set[str] = frozenset(),
) -> None:
    """Load a state of one process, DDP or FSDP2 into a method, sharded or whole, and its optimizer.

    left_out: names of the model's that may be missing: they have their values already. Raises UserError for files that
    are damaged or belong to another model.
    """
    saved = SavedState(checkpoint)
    with damage_named(checkpoint), torch.no_grad():
        there = set(saved.keys("method/")) - {AVERAGED}
        state = method.state_dict()
        own = {k: v for k, v in state.items() if k in there or k.removeprefix(PREFIX) not in left_out}
        if own.keys() != there:
            odd = sorted(own.keys() ^ there)[0]
            where = "the run" if odd in own else "the file"
            raise UserError(f"{checkpoint / STATE} does not fit this run: {odd} is only in {where}")
        for key, tensor in own.items():
            _fill(tensor, saved, f"method/{key}")
        if ema is not None:
            if AVERAGED not in saved.keys("method/"):
                raise UserError(f"{checkpoint} has no averaged weights; leave train.ema_decay out")
            ema.module.load_state_dict(read_weights(checkpoint / MODEL), strict=not left_out)
            ema.n_averaged.copy_(saved.rows(f"method/{AVERAGED}"))
        if saved.numbers is None:
            _load_old_optimizer(checkpoint / STATE / OLD_OPTIMIZER_FILE, optimizer, scaler)
        else:
            _load_optimizer(saved, method, optimizer)
            if scaler is not None and saved.numbers["scaler"] is not None:
                scaler.load_state_dict(saved.numbers["scaler"])


def _fill(tensor: Tensor, saved: SavedState, key: str) -> None:
    if isinstance(tensor, DTensor):
        local = tensor.to_local()
        if local.numel():
            local.copy_(_shaped(saved.rows(key, *owned_rows(tensor)), local, key))
    else:
        tensor.copy_(_shaped(saved.rows(key), tensor, key))


def _shaped(rows: Tensor, like: Tensor, key: str) -> Tensor:
    if rows.shape != like.shape:
        raise UserError(f"{key} has shape {list(rows.shape)} in the checkpoint and {list(like.shape)} in this run")
    return rows


def _load_optimizer(saved: SavedState, method: nn.Module, optimizer: Optimizer) -> None:
    assert saved.numbers is not None
    names = {id(parameter): name for name, parameter in method.named_parameters()}
    groups, values = saved.numbers["groups"], saved.numbers["values"]
    mine = [[names[id(parameter)] for parameter in group["params"]] for group in optimizer.param_groups]
    if mine != [group["params"] for group in groups]:
        raise UserError(f"{saved.checkpoint / STATE} has other parameter groups than this run")
    state: dict[int, dict[str, Any]] = {}
    wanted: dict[str, list[str]] = {}
    there = saved.keys("optimizer/")
    known = saved.numbers.get("tensors")  # older states: a group's parameters are compared with each other
    for key in sorted({*(known or ())} - {*there}):
        name, _, field = key.rpartition("/")
        raise UserError(f"{saved.checkpoint / STATE} has no {field} of {name}; resume from another checkpoint")
    for key in there:
        name, _, field = key.rpartition("/")
        wanted.setdefault(name, []).append(field)
    number, described = 0, []
    for group, stored in zip(optimizer.param_groups, groups, strict=True):
        kept = {key: group.get(key) for key in ("fused", "foreach")}  # how it computes belongs to this machine
        where = group["params"][0].device if group["params"] else torch.device("cpu")
        values_now = {
            key: _restored(_like(value, group.get(key), key), where) for key, value in stored.items() if key != "params"
        }
        described.append({**values_now, **kept, "params": list(range(number, number + len(group["params"])))})
        fields = {field for parameter in group["params"] for field in wanted.get(names[id(parameter)], [])}
        for parameter in group["params"]:
            name = names[id(parameter)]
            if known is None and name in wanted and fields != set(wanted[name]):
                gone = sorted(fields - set(wanted[name]))[0]
                raise UserError(f"{saved.checkpoint / STATE} has no {gone} of {name}; resume from another checkpoint")
            found = {field: _state_of(saved, name, field, parameter) for field in wanted.get(name, [])}
            if found or name in values:
                state[number] = {**found, **values.get(name, {})}
            number += 1
    optimizer.load_state_dict({"state": state, "param_groups": described})


_MOMENTS = {"exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer"}
"""Tensors of a parameter's shape, in every optimizer that has them."""


def _state_of(saved: SavedState, name: str, field: str, parameter: Tensor) -> Tensor:
    """One tensor of a parameter's state, sharded as the parameter where it has the parameter's shape."""
    key = f"optimizer/{name}/{field}"
    if not isinstance(parameter, DTensor) or field == "step":
        rows = saved.rows(key)
        return _shaped(rows, parameter, key) if field in _MOMENTS else rows
    rows = (
        saved.rows(key, *owned_rows(parameter)) if parameter.to_local().numel() else parameter.to_local().detach().cpu()
    )
    return DTensor.from_local(
        _shaped(rows, parameter.to_local(), key).to(parameter.to_local().device),
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )


def _like(value: Any, now: Any, key: str) -> Any:
    """JSON has no tuples: as the group of this run has it. Raises UserError for a value of another kind."""
    numbers = [isinstance(entry, (int, float)) for entry in (value, now)]
    lengths = [len(entry) if isinstance(entry, (list, tuple)) else None for entry in (value, now)]
    if now is not None and value is not None and (numbers[0] != numbers[1] or lengths[0] != lengths[1]):
        raise UserError(f"{key} of the optimizer is {value} in the checkpoint and {now} in this run")
    return tuple(value) if isinstance(now, tuple) and isinstance(value, list) else value


def _load_old_optimizer(path: Path, optimizer: Optimizer, scaler: torch.amp.GradScaler | None) -> None:
    content = torch.load(path, map_location="cpu", weights_only=True)
    own = [{key: group.get(key) for key in ("fused", "foreach")} for group in optimizer.param_groups]
    optimizer.load_state_dict(content["optimizer"])
    for group, kept in zip(optimizer.param_groups, own, strict=True):
        group.update(kept)
    if scaler is not None and content["scaler"] is not None:
        scaler.load_state_dict(content["scaler"])


def is_own_state(folder: Path) -> bool:
    """Whether one process, DDP or FSDP2 wrote this folder; DeepSpeed names its files otherwise."""
    return (folder / OPTIMIZER_JSON).is_file() or (folder / OLD_OPTIMIZER_FILE).is_file()


def load_averaged(checkpoint: Path, ema: AveragedModel) -> None:
    """Load an average that `write_averaged` counted, and the weights of `model/`."""
    with damage_named(checkpoint):
        ema.module.load_state_dict(read_weights(checkpoint / MODEL))
        ema.n_averaged.copy_(load_file(checkpoint / STATE / METHOD_FILE)[AVERAGED])


@contextmanager
def plain_data_only() -> Iterator[None]:
    """Let every `torch.load` inside read tensors and plain values alone; anything else raises UnpicklingError.

    DeepSpeed reads its files with `weights_only=False`
    (https://github.com/deepspeedai/DeepSpeed/blob/master/deepspeed/runtime/checkpoint_engine/torch_checkpoint_engine.py).
    """
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler  # an extra
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    trusting = torch.load

    def plain(*arguments: Any, **keywords: Any) -> Any:
        return trusting(*arguments, **{**keywords, "weights_only": True})

    torch.load = plain
    try:
        with torch.serialization.safe_globals([LossScaler, DynamicLossScaler, ZeroStageEnum, fragment_address]):
            yield
    finally:
        torch.load = trusting


@contextmanager
def damage_named(checkpoint: Path) -> Iterator[None]:
    """Turn a library's error about a file's content into a UserError; a pickle that contains code is one of them."""
    try:
        yield
    except DAMAGE as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"{checkpoint / STATE} does not fit this run or is damaged ({first_line(error)}); resume from another "
            f"checkpoint"
        ) from error


def copied(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies in CPU memory."""
    return {key: tensor.detach().to("cpu", copy=True) for key, tensor in tensors.items()}
