"""A run on the HuggingFace Hub, to be resumed on another machine: `hub.push state`, `--resume user/name`.

Beside the model in the repository's root:

    training/
      run.json            names of the checkpoints: {"last": "step-000800", "best": "step-000400"}
      step-000800/        the newest checkpoint as it is in the run's folder, with its manifest
      step-000400/        the best one, if it is another
      config.yaml         the run, as `--config` takes it
      log.jsonl, trackers.json

Only these two checkpoints are kept there; a file whose content is on the Hub already is not sent again. Every file is
compared with the manifest before the run goes on from it, and none is executed.
"""

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import huggingface_hub
from huggingface_hub import CommitOperationAdd, CommitOperationDelete

from amltrain.errors import UserError, first_line
from amltrain.files import link_or_copy
from amltrain.network import AbsentError, download
from amltrain.run_folder import (
    BEST,
    EXAMPLES,
    LAST,
    LOG_FILE,
    RUN_CONFIG,
    TRACKERS_FILE,
    checkpoints,
    find_fault,
    point,
    step_of,
)

PLACE, NAMES_FILE = "training", "run.json"
BESIDE = (RUN_CONFIG, LOG_FILE, TRACKERS_FILE)
_CHECKPOINT = re.compile(r"step-\d+")


def copy_run(run: Path, checkpoint: Path, target: Path) -> None:
    """Fill an empty folder with second names of what the Hub gets of a run. checkpoint: becomes `last`."""
    best = run / BEST
    for name, source in ((LAST, checkpoint), (BEST, best.resolve() if best.exists() else None)):
        if source is None:
            continue
        if not (target / source.name).exists():
            shutil.copytree(source, target / source.name, copy_function=link_or_copy)
        point(target, name, target / source.name)
    for name in BESIDE:
        if (run / name).is_file():
            shutil.copy2(run / name, target / name)  # the log grows on, so a second name would too
    if (run / EXAMPLES).is_dir():
        shutil.copytree(run / EXAMPLES, target / EXAMPLES, copy_function=link_or_copy)


def added_files(run: Path) -> dict[str, Path | bytes]:
    """The files of a run's folder, or of a copy, by their names in the repository. Raises UserError."""
    places = {name: (run / name).resolve() for name in (LAST, BEST) if (run / name).exists()}
    if LAST not in places:
        raise UserError(f"{run} has no checkpoint {LAST}, so there is no state to push; name a run's folder")
    named = {name: place if _CHECKPOINT.fullmatch(place.name) else _twin(run, place) for name, place in places.items()}
    for place in named.values():
        fault = find_fault(place)
        if fault:
            raise UserError(f"checkpoint {place} is damaged: {fault}; push another one")
    found: dict[str, Path | bytes] = {
        f"{PLACE}/{place.name}/{path.relative_to(place).as_posix()}": path
        for place in named.values()
        for path in sorted(place.rglob("*"))
        if path.is_file()
    }
    found |= {f"{PLACE}/{name}": run / name for name in BESIDE if (run / name).is_file()}
    names = {name: place.name for name, place in named.items()}
    found[f"{PLACE}/{NAMES_FILE}"] = json.dumps(names, indent=1).encode()
    return found


def _twin(run: Path, place: Path) -> Path:
    """The step-N folder of the same step, where `last` and `best` are folders and not links."""
    step = step_of(place)
    return next((path for path in checkpoints(run) if step_of(path) == step), place)


def operations(run: Path, there: set[str]) -> list[CommitOperationAdd | CommitOperationDelete]:
    """What a commit changes for a run's state. there: files of the repository. Raises UserError."""
    files = added_files(run)
    adds = [CommitOperationAdd(name, str(f) if isinstance(f, Path) else f) for name, f in files.items()]
    gone = sorted(name for name in there if name.startswith(f"{PLACE}/") and name not in files)
    return [*adds, *(CommitOperationDelete(name) for name in gone)]


def check_private(api: huggingface_hub.HfApi, repo: str) -> None:
    """Raise UserError for a public repository: a run's config holds names of folders and whatever its user wrote."""
    if api.repo_info(repo).private is False:
        raise UserError(f"{repo} is public, and a run's state is private; make it private, or push another repository")


def fetch_config(source: str) -> Path:
    """Download the config of a run on the Hub, and return its path in the cache. Raises UserError."""
    return download(source, [f"{PLACE}/{RUN_CONFIG}"], f"{PLACE}/{RUN_CONFIG}", _nothing(source))


def _nothing(source: str) -> str:
    return f"{source} holds no run to resume (it was not pushed with --hub.push state); name another repository"


def fetch_run(source: str, output: Path, log: Callable[[str], None], *, may_be_new: bool = False) -> None:
    """Bring a run's folder to where the Hub has it, unless it is there or further already.

    A folder that is there and cannot be compared, because the Hub does not answer, goes on as it is. may_be_new: a
    repository that has no run yet is no error. Raises UserError.
    """
    own = checkpoints(output)
    try:
        names = _names(source)
        newest = int(names[LAST].removeprefix("step-"))
    except UserError as error:
        if may_be_new and isinstance(error, AbsentError):
            return
        if not own and may_be_new:
            raise UserError(f"{error}; the run may be there: try again, or start anew with --resume never") from error
        if not own:
            raise
        log(f"WARNING: {first_line(error)}; the run goes on from {own[-1]}")
        return
    if own and step_of(own[-1]) >= newest:
        log(f"{output} is at step {step_of(own[-1])}, and {source} at {newest}: the run goes on from here")
        return
    log(f"fetching step {newest} of the run from {source}")
    folder = output / ".from-hub"
    place = download(source, [f"{PLACE}/*"], PLACE, _nothing(source), folder)
    for name in dict.fromkeys((names.get(BEST, names[LAST]), names[LAST])):
        fault = find_fault(place / name)
        if fault:
            raise UserError(f"{name} of {source} is damaged: {fault}; run again to fetch it anew, or push it again")
    for name in BESIDE:
        if (place / name).is_file():
            os.replace(place / name, output / name)
    for name in (BEST, LAST):  # `last` at the end: a kill in between fetches again
        if name not in names:
            continue
        target = output / names[name]
        if not target.exists():
            os.replace(place / names[name], target)
        point(output, name, target)
    shutil.rmtree(folder, ignore_errors=True)


def _names(source: str) -> dict[str, str]:
    """Names of the checkpoints in a repository. Raises UserError."""
    path = download(source, [f"{PLACE}/{NAMES_FILE}"], f"{PLACE}/{NAMES_FILE}", _nothing(source))
    try:
        names = json.loads(path.read_text(encoding="utf-8"))
        good = isinstance(names, dict) and LAST in names and names.keys() <= {LAST, BEST}
        if good and all(isinstance(name, str) and _CHECKPOINT.fullmatch(name) for name in names.values()):
            return names
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(
            f"{PLACE}/{NAMES_FILE} of {source} is damaged: {first_line(error)}; push the run again"
        ) from error
    raise UserError(f"{PLACE}/{NAMES_FILE} of {source} does not name checkpoints; push the run again")
