"""Where a run stands: what a resumed run must know besides weights and optimizer.

The `state/` folder of a checkpoint: copied from the device, written, and read without running anything in it.

    method.safetensors   the method's tensors that `model/` does not hold (buffers, projections, loss parameters);
                         with weight averaging also the raw weights (`model/` then holds the averaged ones)
    optimizer.bin        optimizer and gradient scaler, read with `weights_only=True`

FSDP and DeepSpeed write their own files instead. `harmless.py` looks at those before they are loaded.
"""

import math
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel

from amltrain.checkpoints.harmless import check_harmless
from amltrain.checkpoints.run_folder import EVALUATED_FILE, TRAINER_FILE
from amltrain.errors import UserError, first_line, fits
from amltrain.hub.model_folder import read_weights


@dataclass
class Progress:
    """Saved as state/trainer.json.

    step            optimizer steps done; with the seed and the batch size it is also the position in the data
    saved           step of the newest checkpoint; evaluated: of the newest evaluation
    best, best_step best metric so far, and where; worse_in_a_row: evaluations since
    skipped         steps whose loss or gradient was not finite; bad_in_a_row: the newest of them, without a gap
    spread          processes, micro batch, accumulation
    log_lines       lines of log.jsonl so far, which a resumed run keeps
    window          sums of the method's recorder since its last row
    losses          sum of this epoch's finite losses so far, and their number
    seed, samples   of the run and of its training set, which resuming must not change
    """

    step: int = 0
    saved: int = 0
    evaluated: int = 0
    best: float = -math.inf
    best_step: int = 0
    worse_in_a_row: int = 0
    skipped: int = 0
    bad_in_a_row: int = 0
    spread: list[int] = field(default_factory=list)
    seed: int = 0
    samples: int = 0
    log_lines: int = 0
    window: Any = None
    losses: list[float] = field(default_factory=lambda: [0.0, 0])

    def state_dict(self) -> dict[str, Any]:
        return asdict(self)

    def resumed(self, saved: dict[str, Any], name: str) -> "Progress":
        """Continue from a saved progress under this run's spread. Raises UserError if its samples would be others.

        name: of the checkpoint, for the message.
        """
        known = {f.name for f in fields(Progress)}
        spread = saved.get("spread")
        if not saved.keys() <= known or not isinstance(spread, list) or len(spread) != 3:
            raise UserError(f"{name} was made by another version of amltrain; start a new run from its weights")
        if not all(type(value) is int and 0 <= value < 2**63 for value in (*spread, *_counts(saved))):
            raise UserError(f"{name} is damaged: a count in its progress is not one; resume from another checkpoint")
        losses = saved.get("losses", [0.0, 0])
        if not isinstance(losses, list) or not all(fits(value, float) for value in (saved.get("best", 0.0), *losses)):
            raise UserError(f"{name} is damaged: a metric in its progress is no number; resume from another checkpoint")
        before = Progress(**saved)
        for what, then, now in (
            ("train.global_batch_size", math.prod(before.spread), math.prod(self.spread)),
            ("seed", before.seed, self.seed),
            ("the number of training samples", before.samples, self.samples),
        ):
            if then != now:
                raise UserError(
                    f"{name} was made with {what} {then}, not {now}; a resumed run continues with the same samples: "
                    f"set it back, or start a new run in another --output"
                )
        before.spread = self.spread
        return before

    def judge(self, value: float) -> bool:
        """Note an evaluation's best metric; whether it is the best so far. NaN never is."""
        self.evaluated = self.step
        if value > self.best:
            self.best, self.best_step, self.worse_in_a_row = value, self.step, 0
            return True
        self.worse_in_a_row += 1
        return False

    def add_loss(self, loss: float) -> None:
        """Add a step's loss to the mean of its epoch, unless it is not finite."""
        if math.isfinite(loss):
            self.losses = [self.losses[0] + loss, self.losses[1] + 1]

    def take_mean_loss(self) -> float:
        """Return the mean loss since the last call; NaN where no step was finite."""
        (total, steps), self.losses = self.losses, [0.0, 0]
        return total / steps if steps else math.nan

    def count(self, *, bad: bool) -> None:
        """Note a step whose loss and gradient were finite, or not."""
        self.skipped += bad
        self.bad_in_a_row = self.bad_in_a_row + 1 if bad else 0


def _counts(saved: dict[str, Any]) -> list[Any]:
    """The values that must be whole numbers from 0 on."""
    return [value for key, value in saved.items() if key not in ("spread", "best", "window", "losses")]


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
