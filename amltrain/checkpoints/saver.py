"""Save checkpoints while training continues.

One process and DDP: the main process copies the state to CPU memory and a thread writes it. A failed write is reported
at the next step, on every process. FSDP and DeepSpeed: every process writes its share, and training waits.
"""

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from accelerate import Accelerator
from accelerate.utils import DistributedType, gather_object
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel

from amltrain.checkpoints import run_folder as checkpoints
from amltrain.checkpoints.state import (
    is_own_state,
    load_engine_state,
    load_state,
    take_snapshot,
    write_averaged,
    write_state,
)
from amltrain.distributed import model_weights
from amltrain.errors import UserError, first_line

WriteModel = Callable[[Path, dict[str, Tensor]], None]
"""Writes a model folder from whole weights. Raises UserError for weights that must not be saved."""


class Saver:
    """Writes and loads the checkpoints of one run, at most one at a time."""

    def __init__(
        self,
        accelerator: Accelerator,
        output: Path,
        method: nn.Module,
        optimizer: Optimizer,
        ema: AveragedModel | None,
        *,
        keep: int | Literal["all"],
        write_model: WriteModel,
    ) -> None:
        """method, optimizer: prepared by Accelerate. keep: newest checkpoints to keep, besides best and last."""
        self.accelerator, self.output, self.keep = accelerator, output, keep
        self.method, self.optimizer, self.ema, self.write_model = method, optimizer, ema, write_model
        engines = (DistributedType.FSDP, DistributedType.DEEPSPEED)
        self.writes_shards = accelerator.distributed_type in engines
        self._thread: threading.Thread | None = None
        self._fault: str | None = None

    @property
    def failed(self) -> bool:
        """Whether a write in the background has failed; `wait` raises its error."""
        return self._fault is not None

    @property
    def is_writing(self) -> bool:
        """Whether a write is running in the background."""
        return self._thread is not None and self._thread.is_alive()

    def save(self, step: int, trainer_state: dict[str, Any], on_saved: Callable[[Path], None] | None = None) -> None:
        """Save `step-N`; every process calls. Returns as soon as training may continue.

        on_saved: called with the finished checkpoint on the main process, perhaps from another thread. Raises UserError
        on every process if this write, or the one before, failed.
        """
        self.wait()
        if self.writes_shards:
            self._save_shards(step, trainer_state, on_saved)
            return
        if not self.accelerator.is_main_process:
            return
        method = self.accelerator.unwrap_model(self.method)
        snapshot = take_snapshot(method, self.optimizer, self.accelerator.scaler, self.ema)

        def write(folder: Path) -> None:
            write_state(folder / "state", snapshot)
            _write_progress(folder, trainer_state)
            self.write_model(folder / "model", snapshot.weights)

        def work() -> None:
            try:
                path = checkpoints.write_checkpoint(self.output, step, write)
                self._after(path, on_saved)
            except Exception as error:  # reported on every process at the next step
                self._fault = str(error) if isinstance(error, UserError) else f"saving failed: {first_line(error)}"

        self._thread = threading.Thread(target=work, name="checkpoint")
        self._thread.start()

    def wait(self) -> None:
        """Wait for the current write; every process calls. Raises its UserError on all of them."""
        self._refuse(self.join())

    def join(self) -> str | None:
        """Wait on this process alone; why the write failed, or None."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        return self._fault

    def load(self, checkpoint: Path) -> None:
        """Load a checkpoint into the method, the optimizer and the average. Raises UserError."""
        if is_own_state(checkpoint / "state") == self.writes_shards:
            here = self.accelerator.distributed_type.value.lower() if self.writes_shards else "one process or DDP"
            raise UserError(
                f"{checkpoint} was saved by another engine and cannot resume under {here}; use the engine that it was "
                f"saved with, or start a new run from its weights with --model.checkpoint {checkpoint / 'model'}"
            )
        if self.writes_shards:
            load_engine_state(checkpoint, self.accelerator, self.ema)
        else:
            method = self.accelerator.unwrap_model(self.method)
            load_state(checkpoint, method, self.optimizer, self.accelerator.scaler, self.ema)

    def weights(self) -> dict[str, Tensor]:
        """Whole weights of the model being trained, on every process; every process calls."""
        return model_weights(self.accelerator, self.method)

    def _save_shards(self, step: int, trainer_state: dict[str, Any], on_saved: Callable[[Path], None] | None) -> None:
        main = self.accelerator.is_main_process
        weights = model_weights(self.accelerator, self.method) if self.ema is None else self.ema.module.state_dict()
        self._refuse(self._attempt(step, lambda: checkpoints.open_checkpoint(self.output, step)) if main else None)
        folder = self.output / f".{checkpoints.checkpoint_name(step)}.writing"
        fault = self._attempt(step, lambda: self.accelerator.save_state(str(folder / "state")))
        self._refuse(fault)  # all processes have written their share before it is hashed

        def finish() -> None:
            if self.ema is not None:
                write_averaged(folder / "state", self.ema)
            _write_progress(folder, trainer_state)
            self.write_model(folder / "model", weights)
            self._after(checkpoints.finish_checkpoint(self.output, step), on_saved)

        self._refuse(self._attempt(step, finish) if main else None)

    def _after(self, path: Path, on_saved: Callable[[Path], None] | None) -> None:
        if on_saved is not None:
            on_saved(path)
        checkpoints.prune(self.output, self.keep)

    def _attempt(self, step: int, action: Callable[[], Any]) -> str | None:
        try:
            action()
        except Exception as error:
            return str(checkpoints.not_saved(self.output, step, error))
        return None

    def _refuse(self, fault: str | None) -> None:
        """Let every process learn of a failure on any of them, instead of waiting for it."""
        found = [text for text in gather_object([fault]) if text]
        if found:
            self._fault = None
            if self.accelerator.is_main_process:
                checkpoints.remove_leftovers(self.output)
            raise UserError(found[0])


def _write_progress(folder: Path, trainer_state: dict[str, Any]) -> None:
    (folder / checkpoints.TRAINER_FILE).write_text(json.dumps(trainer_state, indent=1))
