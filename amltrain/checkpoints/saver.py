"""Save checkpoints while training continues.

One process and DDP: the main process copies the state to CPU memory and a thread writes it. A failed write is reported
at the next step, on every process. FSDP2 and DeepSpeed: every process writes its share, and training waits.
"""

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from accelerate import Accelerator
from accelerate.utils import DistributedType, gather_object
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel

from amltrain import run_folder
from amltrain.checkpoints.state import (
    damage_named,
    is_own_state,
    load_averaged,
    load_state,
    plain_data_only,
    rank_file,
    split_optimizer,
    take_rows,
    take_snapshot,
    write_averaged,
    write_numbers,
    write_state,
)
from amltrain.distributed import model_weights
from amltrain.errors import UserError, first_line, shared_error
from amltrain.hub.base_weights import Base, read_base
from amltrain.run_folder import MODEL, STATE

WriteModel = Callable[[Path, dict[str, Tensor], int, str], None]
"""Writes a model folder from whole weights, the step, and the last good checkpoint's name.

Raises UserError for weights that must not be saved. Called from a thread."""
TAG = "deepspeed"
"""Folder in `state/` that DeepSpeed writes to."""


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
        base: Base | None = None,
    ) -> None:
        """method, optimizer: prepared by Accelerate. keep: newest checkpoints to keep, besides best and last.

        base: frozen parameters that are not written, and what identifies them; None = everything is.
        """
        self.base, self.left_out = base, frozenset() if base is None else base.names
        self.accelerator, self.output, self.keep = accelerator, output, keep
        self.method, self.optimizer, self.ema, self.write_model = method, optimizer, ema, write_model
        self.writes_shards = accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED)
        self._thread: threading.Thread | None = None
        self._fault: str | None = None
        self._finished: list[Path] = []
        self._folder = run_folder.folder_id(output) if accelerator.is_main_process else None

    @property
    def failed(self) -> bool:
        """Whether a write in the background has failed, or the run's folder is gone; `wait` raises the error."""
        if self._fault is None and self._folder is not None:
            self._fault = self._folder_fault()
        return self._fault is not None

    def _folder_fault(self) -> str | None:
        """Why nothing can be saved any more: the folder was removed or renamed; it is not made again."""
        try:
            now = run_folder.folder_id(self.output)
        except OSError as error:
            return f"{self.output} cannot be read: {error.strerror or error}; make it readable and run again"
        if now == self._folder:
            return None
        what = "was removed or renamed" if now is None else "is another folder than the run began with"
        return (
            f"{self.output} {what} while the run wrote to it; put it back and run again to resume, or start a new run "
            f"in another --output"
        )

    @property
    def is_writing(self) -> bool:
        """Whether a write is running in the background."""
        return self._thread is not None and self._thread.is_alive()

    def save(self, step: int, trainer_state: dict[str, Any]) -> None:
        """Save `step-N`; every process calls. Returns as soon as training may continue.

        Raises UserError on every process if this write, or the one before, failed.
        """
        self._raise_everywhere(self._folder_fault() if self._folder is not None else None)
        self.wait()
        last_good = run_folder.newest(self.output)
        if self.writes_shards:
            self._save_shards(step, trainer_state, last_good)
            return
        if not self.accelerator.is_main_process:
            return
        snapshot = take_snapshot(self._bare, self.optimizer, self.accelerator.scaler, self.ema, self.left_out)

        def write(folder: Path) -> None:
            write_state(folder / STATE, snapshot)
            _write_progress(folder, trainer_state)
            self.write_model(folder / MODEL, snapshot.weights, step, last_good)

        def work() -> None:
            try:
                self._note(run_folder.write_checkpoint(self.output, step, write))
            except Exception as error:  # reported on every process at the next step
                self._fault = str(error) if isinstance(error, UserError) else f"saving failed: {first_line(error)}"

        self._thread = threading.Thread(target=work, name="checkpoint")
        self._thread.start()

    def take_finished(self) -> list[Path]:
        """Checkpoints that are complete since the last call, oldest first; on the main process only."""
        finished, self._finished = self._finished, []
        return finished

    def wait(self) -> None:
        """Wait for the current write; every process calls. Raises its UserError on all of them."""
        self._raise_everywhere(self.join())

    def join(self) -> str | None:
        """Wait on this process alone; why the write failed, or None."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        return self._fault

    def load(self, checkpoint: Path) -> None:
        """Load a checkpoint into the method, the optimizer and the average. Raises UserError."""
        deepspeed = self.accelerator.distributed_type == DistributedType.DEEPSPEED
        if is_own_state(checkpoint / STATE) == deepspeed:
            saved, here = ("another engine", "DeepSpeed") if deepspeed else ("DeepSpeed", "another engine")
            raise UserError(
                f"{checkpoint} was saved by {saved} and cannot resume under {here}; use the engine that it was saved "
                f"with, or start a new run from its weights with --model.checkpoint {checkpoint / MODEL}"
            )
        self._check_base(checkpoint)
        if not deepspeed:
            load_state(checkpoint, self._bare, self.optimizer, self.accelerator.scaler, self.ema, self.left_out)
            return
        with damage_named(checkpoint), plain_data_only():
            self.method.load_checkpoint(  # type: ignore[operator]  # DeepSpeed's engine
                str(checkpoint / STATE), tag=TAG, load_module_strict=not self.left_out
            )
        if self.ema is not None:
            load_averaged(checkpoint, self.ema)

    def _check_base(self, checkpoint: Path) -> None:
        """Raise UserError for a checkpoint whose frozen parameters are left out, and are not this run's."""
        saved = read_base(checkpoint / MODEL)
        if saved is None:
            return
        if self.base is None:
            raise UserError(f"{checkpoint} leaves out frozen parameters; resume with --checkpoint.frozen left_out")
        if saved.sha256 != self.base.sha256:
            told = ", ".join(f"{key} {source}" for key, source in saved.sources.items())
            raise UserError(
                f"{checkpoint} leaves out its frozen parameters, and this run's are others; give the weights that it "
                f"started from ({told})"
            )

    def weights(self) -> dict[str, Tensor]:
        """Whole weights of the model being trained, on every process; every process calls."""
        return model_weights(self.accelerator, self.method)

    @property
    def _bare(self) -> nn.Module:
        return self.accelerator.unwrap_model(self.method)

    def _save_shards(self, step: int, trainer_state: dict[str, Any], last_good: str) -> None:
        main = self.accelerator.is_main_process
        if self.ema is None:
            weights = model_weights(self.accelerator, self.method, keep=main, left_out=self.left_out)
        else:
            weights = {k: v for k, v in self.ema.module.state_dict().items() if k not in self.left_out}
        opened = self._attempt(step, lambda: run_folder.open_checkpoint(self.output, step)) if main else None
        self._raise_everywhere(opened)
        folder = self.output / f".{run_folder.checkpoint_name(step)}.writing"
        # all processes have written their share before it is hashed
        self._raise_everywhere(self._attempt(step, lambda: self._write_share(folder / STATE)))

        def finish() -> None:
            if self.ema is not None:
                write_averaged(folder / STATE, self.ema)
            _write_progress(folder, trainer_state)
            self.write_model(folder / MODEL, weights, step, last_good)
            self._note(run_folder.finish_checkpoint(self.output, step))

        self._raise_everywhere(self._attempt(step, finish) if main else None)

    def _write_share(self, folder: Path) -> None:
        if self.accelerator.distributed_type == DistributedType.DEEPSPEED:
            self.method.save_checkpoint(  # type: ignore[operator]
                str(folder), tag=TAG, save_latest=False, exclude_frozen_parameters=bool(self.left_out)
            )
            return
        rank, processes = self.accelerator.process_index, self.accelerator.num_processes
        rows = take_rows(self._bare, self.optimizer, rank, self.left_out)
        save_file({key: tensor.contiguous() for key, tensor in rows.items()}, rank_file(folder, rank, processes))
        if rank == 0:
            write_numbers(folder, split_optimizer(self._bare, self.optimizer, self.accelerator.scaler)[1])

    def _note(self, path: Path) -> None:
        run_folder.prune(self.output, self.keep)
        self._finished.append(path)

    def _attempt(self, step: int, action: Callable[[], Any]) -> str | None:
        try:
            action()
        except Exception as error:
            return str(run_folder.not_saved(self.output, step, error))
        return None

    def _raise_everywhere(self, fault: str | None) -> None:
        """Let every process learn of a failure on any of them, instead of waiting for it."""
        found = [text for text in gather_object([fault]) if text]
        if found:
            self._fault = None
            if self.accelerator.is_main_process:
                run_folder.remove_leftovers(self.output)
            raise shared_error(found[0])


def _write_progress(folder: Path, trainer_state: dict[str, Any]) -> None:
    (folder / run_folder.TRAINER_FILE).write_text(json.dumps(trainer_state, indent=1))
