"""Every file of a run's folder: names, checkpoints, the log. Nothing here imports torch.

    OUTPUT/
      step-000400/
        model/          safetensors, config, tokenizer: loadable alone with `load_pretrained`; results.json once scored
        state/          what resuming needs besides: optimizer, the method's buffers, trainer.json; evaluated.json
                        (trainer.json after the evaluation) once scored
        manifest.json   size and SHA-256 of every file above
      step-000800/
      last -> step-000800
      best -> step-000400
      config.yaml       the run, as `--config` takes it
      log.jsonl         one line per logged step and evaluation
      results.json      the last evaluation; samples/ has its rows per sample
      pictures/         a sheet per evaluation and split; examples/ has the best prediction of each
      logs/ profile/ trackers.json
      finished          empty: the run reached its end
      requeue           empty: a job script shall start the run again
      .lock             which process trains here

A checkpoint is complete or absent: it is written to a temporary folder, flushed to disk, given its manifest and
renamed. Scores arrive later: their files get new names, and then the manifest is replaced atomically. So a kill at any
moment leaves a complete checkpoint, with or without scores; files that the manifest does not list are ignored.
"""

import json
import os
import re
import shutil
import sys
from collections.abc import Callable
from contextlib import suppress
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, Literal, NamedTuple

from safetensors import SafetensorError

from amltrain import __version__
from amltrain.errors import UserError, first_line
from amltrain.files import flush, flush_tree, hash_once, link_or_copy, replacing, sha256, way_out, write_text

_NAME = re.compile(r"step-(\d+)$")
MANIFEST = "manifest.json"
MODEL, STATE, PICTURES, LOGS, PROFILE, SAMPLES = "model", "state", "pictures", "logs", "profile", "samples"
LAST, BEST = "last", "best"
TRAINER_FILE, EVALUATED_FILE = f"{STATE}/trainer.json", f"{STATE}/evaluated.json"
RUN_CONFIG, LOG_FILE, TRACKERS_FILE = "config.yaml", "log.jsonl", "trackers.json"
FINISHED_FILE, REQUEUE_FILE, LOCK_FILE = "finished", "requeue", ".lock"
SEEN_FILE = ".seen-by-all"
"""A probe: every machine of a run must see what the main process writes."""
WEIGHTS_FILE, CONFIG_FILE, PREPROCESS_FILE = "model.safetensors", "config.json", "preprocessor_config.json"
EXAMPLES, EXAMPLE_FILE = f"{PICTURES}/examples", "example.png"
"""One prediction of each evaluation, and its name in a repository of the Hub."""
EVALUATION = "evaluation"
"""The last scores of `amltrain finetune`, of whole splits, with own and with shuffled sentences."""
CAPTION = "Description"
"""The key of a caption in a PNG file."""
RESULTS_FILE, TRAINING_FILE, CONVERSION_FILE = "results.json", "training.json", "conversion.json"
MODEL_FILES = (WEIGHTS_FILE, "*.json", "*.txt")
"""Patterns of a model folder's files: what goes to the Hub and comes from it."""
Log = Callable[[str], None]


def checkpoint_name(step: int) -> str:
    """Name of the checkpoint of a step."""
    return f"step-{step:06d}"


def checkpoints(output: Path) -> list[Path]:
    """Checkpoints by their names, oldest first. A folder gets such a name only when it is finished."""
    return sorted((path for path in output.glob("step-*") if _NAME.search(path.name)), key=step_of)


def step_of(checkpoint: Path) -> int:
    """The step in a checkpoint's name; follows `last` and `best`."""
    match = _NAME.search(checkpoint.resolve().name)
    if match is None and (checkpoint / TRAINER_FILE).is_file():  # `last` and `best` where there are no links
        return int(load_trainer_state(checkpoint)["step"])
    if match is None:
        raise UserError(f"{checkpoint} is not a checkpoint; name a step-N folder, or last or best")
    return int(match[1])


def newest(output: Path) -> str:
    """The newest checkpoint, for messages: weights that are not finite are never saved."""
    return next((str(path) for path in reversed(checkpoints(output))), "none yet")


def find_fault(checkpoint: Path) -> str | None:
    """Compare every file of a checkpoint with its manifest; return the fault, or None."""
    return _fault_of(checkpoint, "")


def _fault_of(folder: Path, prefix: str) -> str | None:
    """The first fault among the files that the manifest in `folder` lists under names that start with `prefix`."""
    try:
        files = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
        listed = {name: entry for name, entry in files.items() if name.startswith(prefix)}
        if not listed:
            return f"its {MANIFEST} lists no file"
        for name, entry in listed.items():
            path = folder / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != entry["size"]:
                return f"{name} has {path.stat().st_size} bytes instead of {entry['size']}"
            if hash_once(path) != entry["sha256"]:
                return f"{name} has changed since it was written"
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return f"its {MANIFEST} cannot be read ({first_line(error)})"
    return None


class ModelIdentity(NamedTuple):
    """Which model a folder has: the step of its checkpoint (None outside a run) and the SHA-256 of its weights."""

    step: int | None
    weights: str

    def described(self) -> dict[str, Any]:
        """As results, samples and predictions name it."""
        return {**({} if self.step is None else {"step": self.step}), "weights_sha256": self.weights}


def check_model(folder: Path) -> ModelIdentity:
    """Compare a model folder with the manifest of its checkpoint, or with its own; the one check of every command.

    Weights, config, preprocessor, tokenizer and whatever else the manifest lists must be as they were written, and no
    file may have joined them. A folder without a manifest (of `save_pretrained`, or copied out of its checkpoint) is
    taken as it is. Raises UserError.
    """
    folder = folder.resolve()
    inside = folder.name == MODEL and (folder.parent / MANIFEST).is_file()
    place, prefix = (folder.parent, f"{MODEL}/") if inside else (folder, "")
    if inside or _is_own_manifest(folder / MANIFEST):
        fault = _fault_of(place, prefix) or _joined(place, folder, prefix)
        if fault:
            raise UserError(
                f"{folder} is not the model that was saved: {fault}; use another checkpoint or copy it again (a model "
                f"that you changed on purpose belongs in a folder of its own, without {MANIFEST})"
            )
    weights = folder / WEIGHTS_FILE
    try:
        hashed = hash_once(weights) if weights.is_file() else ""
    except OSError as error:
        raise UserError(f"{weights} cannot be read: {error.strerror or error}") from error
    match = _NAME.fullmatch(folder.parent.name) if folder.name == MODEL else None
    return ModelIdentity(None if match is None else int(match[1]), hashed)


def _is_own_manifest(path: Path) -> bool:
    """Whether this file of a model folder is ours: a stranger's repository may have another manifest.json."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(content, dict) and {"amltrain", "files"} <= content.keys()


def _joined(place: Path, folder: Path, prefix: str) -> str | None:
    """A file that loading would read and that the manifest does not list; scores may arrive before their entry."""
    listed = json.loads((place / MANIFEST).read_text(encoding="utf-8"))["files"]
    for path in sorted(folder.iterdir()):
        read = any(fnmatch(path.name, pattern) for pattern in MODEL_FILES) and path.name not in (MANIFEST, RESULTS_FILE)
        if read and prefix + path.name not in listed:
            return f"{prefix}{path.name} is not in its {MANIFEST}"
    return None


def write_model_manifest(folder: Path) -> None:
    """Write the manifest of a model folder that stands alone: size and SHA-256 of each of its files. Raises OSError."""
    names = sorted(p.name for p in folder.iterdir() if p.is_file() and p.name != MANIFEST)
    write_text(folder / MANIFEST, model_manifest({name: folder / name for name in names}))


def model_manifest(files: dict[str, Path]) -> str:
    """The text of a model folder's own manifest."""
    entries = {name: {"size": path.stat().st_size, "sha256": hash_once(path)} for name, path in files.items()}
    return json.dumps({"amltrain": __version__, "files": entries}, indent=1)


def find_resumable(output: Path, resume: str, warn: Log) -> Path | None:
    """Find the checkpoint that `--resume` means; None = start a new run.

    auto takes the newest complete one, and warns of every damaged one that it skips. Raises UserError for a named one
    that is damaged, for `never` in a folder that has checkpoints, and for `auto` if all of several are damaged.
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
            shown = resume or "an empty name"
            raise UserError(f"{shown} is not a checkpoint (it has no {MANIFEST}); {_resumable_in(named, resume)}")
        fault = find_fault(named)
        if fault:
            raise UserError(f"checkpoint {resume} is damaged: {fault}; resume from another one, or with --resume auto")
        newest = checkpoints(output)[-1:]
        if named.parent == output.resolve() and step_of(newest[0]) > step_of(named):
            raise UserError(
                f"{output} continues after {named.name} up to {newest[0].name}; resume from that with --resume auto, "
                f"or branch off from {named.name} in another --output"
            )
        return named
    faults = []
    for checkpoint in reversed(checkpoints(output)):
        fault = find_fault(checkpoint)
        if fault is None:
            return checkpoint
        faults.append(f"{checkpoint}: {fault}")
        warn(f"WARNING: skipping a damaged checkpoint, {faults[-1]}")
    if faults:
        raise UserError(
            f"every checkpoint in {output} is damaged ({'; '.join(faults)}); start a new run in another --output"
        )
    return None


def _resumable_in(folder: Path, name: str) -> str:
    """What to do about a --resume that names a folder which is not a checkpoint."""
    if checkpoints(folder):
        return f"it is a run: resume it with --output {name}, or name {name}/{LAST}"
    if (folder / RUN_CONFIG).is_file() or (folder / LOG_FILE).is_file():
        return f"it is a run that has saved nothing yet: start it again with --output {name}"
    return "name a step-N folder, or last or best"


def write_checkpoint(output: Path, step: int, write: Callable[[Path], None]) -> Path:
    """Write `step-N` and point `last` at it. write: fills the folder that it is given with `model/` and `state/`.

    Raises UserError if it cannot be written; earlier checkpoints stay as they are.
    """
    temporary = open_checkpoint(output, step)
    try:
        write(temporary)
        return finish_checkpoint(output, step)
    except (OSError, RuntimeError, SafetensorError, UserError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise not_saved(output, step, error) from error


def open_checkpoint(output: Path, step: int) -> Path:
    """Make the temporary folder of a checkpoint, empty. Raises UserError."""
    temporary = _temporary(output, step)
    try:
        _make_room(temporary)
    except OSError as error:
        raise not_saved(output, step, error) from error
    return temporary


def finish_checkpoint(output: Path, step: int) -> Path:
    """Turn the temporary folder into a checkpoint: manifest, flush, rename, `last`."""
    temporary, final = _temporary(output, step), output / checkpoint_name(step)
    _write_manifest(temporary)
    _rename(temporary, final)
    point(output, LAST, final)
    return final


def folder_id(output: Path) -> tuple[int, int] | None:
    """What tells a run's folder from another of the same name; None where there is none."""
    try:
        status = output.stat()
    except FileNotFoundError:
        return None
    return status.st_dev, status.st_ino


def not_saved(output: Path, step: int, error: Exception) -> UserError:
    """The error of a checkpoint that could not be written, with the way out; a UserError stays as it is."""
    if isinstance(error, UserError) and not isinstance(error.__cause__, (OSError, SafetensorError)):
        return error
    fault = error if isinstance(error, OSError) else error.__cause__ if isinstance(error.__cause__, OSError) else None
    return UserError(f"could not save {output / checkpoint_name(step)}: {first_line(error)} ({way_out(fault, output)})")


def add_scores(checkpoint: Path, trainer_state: dict[str, Any], write_results: Callable[[Path], None]) -> None:
    """Add an evaluation's scores to a finished checkpoint. write_results: writes results.json at the path it is given.

    Raises UserError if they cannot be written; the checkpoint without them stays complete.
    """
    manifest_path = checkpoint / MANIFEST
    try:
        write_text(checkpoint / EVALUATED_FILE, json.dumps(trainer_state, indent=1))
        write_results(checkpoint / MODEL / RESULTS_FILE)
        manifest = json.loads(manifest_path.read_text(encoding="utf-8"))
        for name in (EVALUATED_FILE, f"{MODEL}/{RESULTS_FILE}"):
            manifest["files"][name] = _entry(checkpoint / name)
            flush(checkpoint / name)
        _replace_manifest(manifest_path, manifest)
        flush(checkpoint)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"could not add the scores to {checkpoint}: {first_line(error)} ({way_out(error, checkpoint.parent)})"
        ) from error


def load_trainer_state(checkpoint: Path) -> dict[str, Any]:
    """Read the progress that a checkpoint was saved with, after its evaluation if it had one. Raises UserError."""
    try:
        listed = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))["files"]
        name = EVALUATED_FILE if EVALUATED_FILE in listed else TRAINER_FILE
        state = json.loads((checkpoint / name).read_text(encoding="utf-8"))
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{checkpoint} is damaged: {first_line(error)}; resume from another one") from error
    if not isinstance(state, dict):
        raise UserError(f"{checkpoint / name} must hold a JSON object; resume from another checkpoint")
    return state


def saved_weights(checkpoint: Path) -> str:
    """SHA-256 of a checkpoint's weights, as its manifest lists it. Raises UserError."""
    try:
        files = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))["files"]
        return str(files[f"{MODEL}/{WEIGHTS_FILE}"]["sha256"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{checkpoint} is damaged: {first_line(error)}; run again to save it again") from error


def point(output: Path, name: str, checkpoint: Path) -> None:
    """Let `last` or `best` point at a checkpoint, atomically."""
    with replacing(output / name) as temporary:
        try:
            temporary.symlink_to(checkpoint.name, target_is_directory=True)
        except OSError:  # Windows without the right to make links, some network file systems
            shutil.copytree(checkpoint, temporary, copy_function=link_or_copy)


def prune(output: Path, keep: int | Literal["all"]) -> None:
    """Remove all but the newest `keep` checkpoints and the ones that `last` and `best` point at."""
    if keep == "all":
        return
    pointed = {(output / name).resolve() for name in (LAST, BEST)}
    for checkpoint in checkpoints(output)[: -keep or None]:
        if checkpoint.resolve() not in pointed:
            _put_away(checkpoint)
            shutil.rmtree(_removing(checkpoint), ignore_errors=True)


def remove_leftovers(output: Path) -> None:
    """Clear what a killed process left half-written, half-removed or half-pushed."""
    for path in [path for end in ("writing", "removing", "pushing") for path in output.glob(f".step-*.{end}")]:
        shutil.rmtree(path, ignore_errors=True)
    for path in output.glob(".*.tmp"):
        path.unlink(missing_ok=True)


def _temporary(output: Path, step: int) -> Path:
    return output / f".{checkpoint_name(step)}.writing"


def _make_room(temporary: Path) -> None:
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()  # not its parents: a run's folder that was removed is not made again
    (temporary / STATE).mkdir()


def _entry(path: Path) -> dict[str, Any]:
    return {"size": path.stat().st_size, "sha256": sha256(path)}


def _replace_manifest(path: Path, manifest: dict[str, Any]) -> None:
    write_text(path, json.dumps(manifest, indent=1))


def _write_manifest(folder: Path) -> None:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    entries = {path.relative_to(folder).as_posix(): _entry(path) for path in files}
    (folder / MANIFEST).write_text(json.dumps({"amltrain": __version__, "files": entries}, indent=1))
    flush_tree(folder)


def _rename(temporary: Path, final: Path) -> None:
    if final.exists():
        _put_away(final)
    os.replace(temporary, final)
    flush(final.parent)
    shutil.rmtree(_removing(final), ignore_errors=True)


def _removing(checkpoint: Path) -> Path:
    return checkpoint.with_name(f".{checkpoint.name}.removing")


def _put_away(checkpoint: Path) -> None:
    """Hide a checkpoint atomically: a half-removed folder must not look like a checkpoint."""
    shutil.rmtree(_removing(checkpoint), ignore_errors=True)
    os.replace(checkpoint, _removing(checkpoint))


def mark_requeue(output: Path, wanted: bool, *, make: bool = True) -> None:
    """Tell a job script whether to queue the run again. make: also where the run has no folder yet."""
    if wanted:
        if make:
            output.mkdir(parents=True, exist_ok=True)
        with suppress(FileNotFoundError):  # the folder was removed: there is nothing to resume
            (output / REQUEUE_FILE).touch()
    else:
        (output / REQUEUE_FILE).unlink(missing_ok=True)


def find_model_folder(source: str | Path, revision: str | None = None) -> Path:
    """Find a model's local folder: `source`, its `model/`, a run's `best/model/`, or a Hub repository in the cache.

    A repository may carry its revision: "user/name@v1". An explicit `revision` wins.
    """
    local = Path(source)
    for folder in (local, local / MODEL, local / BEST / MODEL):
        if (folder / CONFIG_FILE).is_file():
            return folder
    if (local / LAST / MODEL / CONFIG_FILE).is_file():
        print(f"{source} has no best checkpoint yet; {local / LAST} is used", file=sys.stderr)
        return local / LAST / MODEL
    if local.exists():
        raise UserError(f"{source} has no {CONFIG_FILE} and no best/model; give a run or a model folder, e.g. RUN/last")
    _reject_checkpoint(local)
    from amltrain.network import download_model  # imports the Hub's client, only where a name is not a folder

    return download_model(str(source), revision, MODEL_FILES)


def is_repository(resume: str) -> bool:
    """Whether a `--resume` names a repository: user/name or user/name@REVISION, where no such folder is."""
    return bool(re.fullmatch(r"[\w.-]+/[\w.-]+(@[\w./-]+)?", resume)) and not Path(resume).exists()


def public_name(source: str) -> str:
    """The name of a local file or folder without the path that leads there; a Hub id as it is."""
    return Path(source).resolve().name if Path(source).exists() else source


def _reject_checkpoint(place: Path) -> None:
    """Raise UserError for a checkpoint that its run does not have, with the names of those that are there."""
    models = (path.parent.name for path in place.parent.glob("*/model"))
    present = sorted(name for name in models if re.fullmatch(r"best|last|step-\d+", name))
    if present:
        why = "; the first evaluation makes it" if place.name == BEST else ""
        raise UserError(f"{place.parent} has no checkpoint {place.name}{why}; it has {', '.join(present)}")


def read_log(run: Path) -> list[dict[str, Any]]:
    """Rows of a run's log, each with its integer "step"; a last line that a kill cut off is left out.

    Returns [] for a run without a log. Raises UserError for a damaged line.
    """
    path = run / LOG_FILE
    if not path.is_file():
        return []
    rows: list[dict[str, Any]] = []
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            if not isinstance(row, dict) or type(row.get("step")) is not int:
                raise ValueError("it has no step")
            rows.append(row)
        except (ValueError, RecursionError) as error:
            if number < len(lines):
                raise UserError(f"{path}, line {number} is damaged ({first_line(error)}); remove that line") from error
    return rows
