"""Checkpoints that are whole or absent.

    OUTPUT/
      step-000400/
        model/          safetensors, config, tokenizer: loadable alone with `load_pretrained`
        state/          everything else that resuming needs: optimizer, scaler, the method's buffers, trainer.json
        manifest.json   size and SHA-256 of every file above
      step-000800/
      last -> step-000800
      best -> step-000400

A checkpoint is written beside its name, flushed to disk, given its manifest and only then renamed. Whatever is cut off
before that is a folder that nobody looks at; whatever is damaged later no longer fits its manifest.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import gather_object
from safetensors import SafetensorError

from amltrain.errors import UserError
from amltrain.hub.model_folder import first_line
from amltrain.training.failures import free_space

_NAME = re.compile(r"step-(\d+)$")
MANIFEST = "manifest.json"
Warn = Callable[[str], None]


def checkpoint_name(step: int) -> str:
    return f"step-{step:06d}"


def checkpoints(output: Path) -> list[Path]:
    """Checkpoints by their names, oldest first. A folder gets such a name only when it is finished."""
    return sorted((path for path in output.glob("step-*") if _NAME.search(path.name)), key=step_of)


def step_of(checkpoint: Path) -> int:
    """The step in a checkpoint's name; follows `last` and `best`."""
    match = _NAME.search(checkpoint.resolve().name)
    if match is None:
        raise UserError(f"{checkpoint} is no checkpoint; name a step-N folder, or last or best")
    return int(match[1])


def find_fault(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, by its manifest; None if nothing is."""
    try:
        manifest = json.loads((checkpoint / MANIFEST).read_text())
        for name, entry in manifest["files"].items():
            path = checkpoint / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != entry["size"]:
                return f"{name} has {path.stat().st_size} bytes instead of {entry['size']}"
            if _sha256(path) != entry["sha256"]:
                return f"{name} has changed since it was written"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"its {MANIFEST} cannot be read ({error})"
    return None


def find_resumable(output: Path, resume: str, warn: Warn) -> Path | None:
    """The checkpoint that `--resume` means; None = start anew.

    auto takes the newest whole one, and says aloud which damaged ones it passes over. Raises UserError for a named one
    that is damaged, for `never` in a folder that has checkpoints, and for `auto` if none of several is whole.
    """
    if resume == "never":
        if checkpoints(output):
            raise UserError(
                f"{output} has checkpoints and resume is never; choose another --output or remove the folder"
            )
        return None
    if resume != "auto":
        named = Path(resume).resolve()
        if not (named / MANIFEST).is_file():
            raise UserError(f"{resume} is no checkpoint (it has no {MANIFEST}); name a step-N folder, or last or best")
        fault = find_fault(named)
        if fault:
            raise UserError(f"checkpoint {resume} is damaged: {fault}; resume from another one, or with --resume auto")
        newest = checkpoints(output)[-1:]
        if named.parent == output.resolve() and step_of(newest[0]) > step_of(named):
            raise UserError(
                f"{output} goes on after {named.name} to {newest[0].name}; take that with --resume auto, or branch off "
                f"from {named.name} in another --output"
            )
        return named
    faults = []
    for checkpoint in reversed(checkpoints(output)):
        fault = find_fault(checkpoint)
        if fault is None:
            return checkpoint
        faults.append(f"{checkpoint}: {fault}")
        warn(f"WARNING: passing over a damaged checkpoint, {faults[-1]}")
    if faults:
        raise UserError(
            f"no whole checkpoint is left in {output} ({'; '.join(faults)}); start anew in another --output"
        )
    return None


def save_checkpoint(
    accelerator: Accelerator,
    output: Path,
    step: int,
    trainer_state: dict[str, Any],
    write_model: Callable[[Path], None],
) -> Path:
    """Write `step-N` from all processes. write_model: writes the model folder; called on the main process only.

    Raises UserError on every process if any of them could not write; earlier checkpoints stay as they are.
    """
    final = output / checkpoint_name(step)
    aside = output / f".{final.name}.writing"
    fault = _attempt(lambda: _make_room(aside)) if accelerator.is_main_process else None
    _refuse(accelerator, fault, aside, final)
    fault = _attempt(lambda: accelerator.save_state(str(aside / "state")))
    _refuse(accelerator, fault, aside, final)  # all have written their part before it is hashed
    if accelerator.is_main_process:
        fault = _attempt(lambda: _finish(aside, final, trainer_state, write_model))
    _refuse(accelerator, fault, aside, final)
    if accelerator.is_main_process:
        point(output, "last", final)
    return final


def _make_room(aside: Path) -> None:
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)


def _refuse(accelerator: Accelerator, fault: str | None, aside: Path, final: Path) -> None:
    """Every process learns of a full disk on any of them, instead of waiting for it for ever."""
    faults = [found for found in gather_object([fault]) if found]
    if faults:
        if accelerator.is_main_process:
            shutil.rmtree(aside, ignore_errors=True)
        raise UserError(
            f"could not save {final}: {faults[0]} ({free_space(final.parent)}); earlier checkpoints are intact, "
            f"make room and run again"
        )


def load_trainer_state(checkpoint: Path) -> dict[str, Any]:
    return json.loads((checkpoint / "state" / "trainer.json").read_text())


def point(output: Path, name: str, checkpoint: Path) -> None:
    """Let `last` or `best` point at a checkpoint, in one step."""
    aside = output / f".{name}.writing"
    aside.unlink(missing_ok=True)
    aside.symlink_to(checkpoint.name)
    os.replace(aside, output / name)


def prune(output: Path, keep: int) -> None:
    """Remove all but the newest `keep` checkpoints and the ones that `last` and `best` point at."""
    pointed = {(output / name).resolve() for name in ("last", "best")}
    for checkpoint in checkpoints(output)[: -keep or None]:
        if checkpoint.resolve() not in pointed:
            _put_away(checkpoint)
            shutil.rmtree(_removing(checkpoint), ignore_errors=True)


def remove_leftovers(output: Path) -> None:
    """Clear what a killed process left half-written, half-removed or half-pushed."""
    for path in [path for end in ("writing", "removing", "pushing") for path in output.glob(f".step-*.{end}")]:
        shutil.rmtree(path, ignore_errors=True)


def _finish(aside: Path, final: Path, trainer_state: dict[str, Any], write_model: Callable[[Path], None]) -> None:
    (aside / "state" / "trainer.json").write_text(json.dumps(trainer_state, indent=1))
    write_model(aside / "model")
    _write_manifest(aside)
    _rename(aside, final)


def _write_manifest(aside: Path) -> None:
    files = sorted(path for path in aside.rglob("*") if path.is_file())
    entries = {str(path.relative_to(aside)): {"size": path.stat().st_size, "sha256": _sha256(path)} for path in files}
    (aside / MANIFEST).write_text(json.dumps({"files": entries}, indent=1))
    for path in [*files, aside / MANIFEST, *(p for p in aside.rglob("*") if p.is_dir()), aside]:
        _flush(path)


def _rename(aside: Path, final: Path) -> None:
    if final.exists():
        _put_away(final)
    os.replace(aside, final)
    _flush(final.parent)
    shutil.rmtree(_removing(final), ignore_errors=True)


def _removing(checkpoint: Path) -> Path:
    return checkpoint.with_name(f".{checkpoint.name}.removing")


def _put_away(checkpoint: Path) -> None:
    """Out of sight, in one step: a half-removed folder must not look like a checkpoint."""
    shutil.rmtree(_removing(checkpoint), ignore_errors=True)
    os.replace(checkpoint, _removing(checkpoint))


def _attempt(action: Callable[[], None]) -> str | None:
    """Run; the reason if it could not write."""
    try:
        action()
    except (OSError, RuntimeError, SafetensorError, UserError) as error:
        return first_line(error)
    return None


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for block in iter(lambda: file.read(2**20), b""):
            digest.update(block)
    return digest.hexdigest()
