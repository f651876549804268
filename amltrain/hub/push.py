"""Publishing model folders on the HuggingFace Hub.

A push is one commit: weights, configs, tokenizer, scores and a model card arrive together. Loading needs
nothing from here: `load_pretrained("user/name")` downloads a repository like any model folder.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, NamedTuple

import huggingface_hub
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import disable_progress_bars, validate_repo_id
from huggingface_hub.utils import logging as hub_logging
from PIL import Image
from safetensors import SafetensorError, safe_open

from amltrain.config.schema import HubConfig
from amltrain.errors import UserError, first_line
from amltrain.evaluation.results import Results, read_results, results_json
from amltrain.files import link_or_copy
from amltrain.hub.base_weights import read_base
from amltrain.hub.benchmark import result_files
from amltrain.hub.model_card import build_model_card
from amltrain.hub.run_state import added_files, check_private, copy_run, operations
from amltrain.network import failure_reason, limit_waiting
from amltrain.registry import import_flags
from amltrain.run_folder import (
    CAPTION,
    EVALUATION,
    EXAMPLE_FILE,
    EXAMPLES,
    LAST,
    LOG_FILE,
    MANIFEST,
    MODEL,
    MODEL_FILES,
    PREPROCESS_FILE,
    RESULTS_FILE,
    STATE,
    TRAINING_FILE,
    WEIGHTS_FILE,
    check_model,
    checkpoint_name,
    find_model_folder,
    model_manifest,
    read_log,
)

PAUSES = (0.0, 10.0, 30.0, 60.0)
"""Seconds before each of the tries at the end of a run."""
LONGEST_PUSH = 3600.0
"""Seconds that one push beside a training may take."""
LONGEST_WAIT = 300.0
"""Seconds that the end of a run waits for pushes in all: an upload must not hold a cluster's nodes. What is not on the
Hub by then is pushed later by hand."""


def push_model(
    source: str | Path,
    repo: str,
    *,
    private: bool,
    revision: str | None = None,
    results_file: str | Path | None = None,
    dry_run: bool = False,
    benchmark: str | None = None,
    picture: bool = True,
    state: bool = False,
) -> str:
    """Push a model folder, or a checkpoint folder that has one in `model/`, and return the commit's address.

    repo: user/name, created if missing (private if `private`). revision: branch to push to, created if missing.
    results_file: scores for the card instead of the folder's own. dry_run: check everything without contacting the Hub,
    and return the card and the list of files. benchmark: data set repository for which the scores are also pushed, see
    `amltrain.hub.benchmark`. picture: with one prediction that the run drew when it was scored, where there is one.
    state: source is a run's folder; its last checkpoint is pushed, with all that resuming needs (`hub.run_state`).
    Raises UserError, in one line, for a folder that is absent or not whole, a repository name that cannot be, a missing
    or rejected token, and a Hub out of reach.
    """
    check_access(repo, online=not dry_run)
    run = Path(source)
    folder = _whole_model_folder(run / LAST if state else run)
    scores = Path(results_file) if results_file is not None else folder / RESULTS_FILE
    found = read_results(scores) if results_file is not None or scores.is_file() else []
    if results_file is None and not any(row.is_score for row in found):
        found = _last_scores(folder)
    results = [_public(row) for row in found if row.is_score]  # never a perturbed, shuffled or partial row
    if results_file is not None and not results:
        raise UserError(f"{results_file} holds no score: {_altered(found)}; evaluate the whole split as it is")
    example = find_example(folder) if picture else None
    caption = None if example is None else _caption(example)
    card = build_model_card(folder, repo, results, rows=_logged(folder), caption=caption)
    evaluated = {} if benchmark is None else result_files(results, benchmark, repo)
    files = {p.name: p for p in sorted(folder.iterdir()) if any(fnmatch(p.name, pattern) for pattern in MODEL_FILES)}
    files.pop(RESULTS_FILE, None)
    adds = [CommitOperationAdd(name, str(path)) for name, path in files.items()]
    if results:
        adds.append(CommitOperationAdd(RESULTS_FILE, results_json(results).encode()))
    listed = {name: path for name, path in files.items() if name != MANIFEST}
    adds = [add for add in adds if add.path_in_repo != MANIFEST]
    adds.append(CommitOperationAdd(MANIFEST, model_manifest(listed).encode()))  # a download is checked against it
    adds.append(CommitOperationAdd("README.md", str(card).encode()))
    if example is not None:
        adds.append(CommitOperationAdd(EXAMPLE_FILE, str(example)))
        files[EXAMPLE_FILE] = example
    adds += [CommitOperationAdd(name, text.encode()) for name, text in evaluated.items()]
    if dry_run:
        kept = {name: path for name, path in added_files(run).items() if isinstance(path, Path)} if state else {}
        return _would_push(repo, {**files, **kept}, evaluated, card)
    limit_waiting()
    api = HfApi(library_name="amltrain")
    try:
        api.create_repo(repo, private=private, exist_ok=True)
        if state:
            check_private(api, repo)
        if revision is not None:
            api.create_branch(repo, branch=revision, exist_ok=True)
        there = set(api.list_repo_files(repo, revision=revision))
        # an earlier push's scores are not this model's
        added = {add.path_in_repo for add in adds}
        old = [
            CommitOperationDelete(name) for name in (RESULTS_FILE, TRAINING_FILE, EXAMPLE_FILE) if name in there - added
        ]
        rest = operations(run, there) if state else []
        return api.create_commit(
            repo, [*adds, *old, *rest], commit_message=_message(results), revision=revision
        ).commit_url
    except UserError:
        raise
    except Exception as error:  # of requests or httpx, depending on huggingface_hub's version
        raise UserError(f"could not push to {repo}: {failure_reason(error, repo, writing=True)}") from error


def _run_of(folder: Path) -> tuple[Path | None, int]:
    """The run of a checkpoint's model folder, or of a copy that waits to be pushed, and its step; (None, 0) outside."""
    for checkpoint in (folder.parent, folder):
        name = re.fullmatch(r"\.?step-(\d+)(?:\..*\.pushing)?", checkpoint.name)
        if name is not None and (checkpoint.parent / LOG_FILE).is_file():
            return checkpoint.parent, int(name[1])
    return None, 0


def _last_scores(folder: Path) -> list[Results]:
    """What `amltrain finetune` scored these weights with at its end, in the run's folder; [] without it."""
    run, _ = _run_of(folder)
    file = None if run is None else run / EVALUATION / RESULTS_FILE
    if file is None or not file.is_file():
        return []
    weights = check_model(folder).weights
    return [row for row in read_results(file) if row.provenance.get("weights_sha256") == weights]


def _logged(folder: Path) -> list[dict[str, Any]]:
    """The rows of the run's log until this model was saved; [] outside a run."""
    run, step = _run_of(folder)
    return [] if run is None else [row for row in read_log(run) if row["step"] <= step]


def _would_push(repo: str, files: dict[str, Path], evaluated: dict[str, str], card: Any) -> str:
    """What a push would upload, in words."""
    sizes = "\n".join(f"  {name:30} {path.stat().st_size:>13,} bytes" for name, path in files.items())
    scored = "".join(f"\n  {name}:\n\n{text}" for name, text in evaluated.items())
    return f"would push to {repo}:\n{sizes}{scored}\n  README.md:\n\n{card}"


def find_example(folder: Path) -> Path | None:
    """The picture of a prediction that the run drew of this model, of the first of its splits; None without one."""
    run, step = _run_of(folder)
    drawn = [] if run is None else sorted((run / EXAMPLES).glob(f"{checkpoint_name(step)}-*.png"))
    return min(drawn, key=lambda path: not path.stem.endswith("-val"), default=None)


def _caption(picture: Path) -> str:
    try:
        with Image.open(picture) as image:
            return str(image.info.get(CAPTION, "A prediction."))
    except OSError as error:
        raise UserError(
            f"{picture} cannot be read ({first_line(error)}); remove it, or push without a picture"
        ) from error


def _public(row: Results) -> Results:
    """A row without paths of this machine: of a checkpoint outside the working folder, its last two names remain."""
    provenance = {
        key: "/".join(Path(value).parts[-2:]).lstrip("/") if _is_outside(value) else value
        for key, value in row.provenance.items()
    }
    return replace(row, provenance=provenance, files={})


def _is_outside(value: Any) -> bool:
    return isinstance(value, str) and value.startswith(("/", "~", "../")) and "\n" not in value


def check_access(repo: str, *, online: bool = True) -> None:
    """Raise UserError for a malformed repository name and, if `online`, for a missing token or an offline client."""
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise UserError(f"{repo!r} cannot name a Hub repository: {first_line(error)}") from error
    if repo.count("/") != 1:
        raise UserError(f"{repo!r} does not say whose repository it is; write user/{repo}")
    if not online:
        return
    if huggingface_hub.constants.HF_HUB_OFFLINE:
        raise UserError("HF_HUB_OFFLINE is set, so nothing can be pushed; unset it, or push later with amltrain push")
    if huggingface_hub.get_token() is None:
        raise UserError("there is no Hub token; log in with `hf auth login`, or set HF_TOKEN")


def _whole_model_folder(source: Path) -> Path:
    if not source.exists():
        raise UserError(f"folder {source} does not exist; name a model folder, e.g. RUN/best")
    folder = find_model_folder(source).resolve()
    check_model(folder)
    base = read_base(folder)
    local = [name for name in (base.sources.values() if base else ()) if Path(name).exists()]
    if local:
        raise UserError(
            f"{folder} leaves out parameters of {local[0]}, which nobody else has; push the whole model: "
            f"amltrain export --checkpoint {source} --output FOLDER --merged"
        )
    try:
        with safe_open(folder / WEIGHTS_FILE, framework="pt"):  # checks the header and the file's length
            pass
    except (OSError, SafetensorError) as error:
        raise UserError(f"{folder / WEIGHTS_FILE} is missing or damaged ({first_line(error)})") from error
    if not (folder / PREPROCESS_FILE).is_file():
        raise UserError(f"{folder} has no {PREPROCESS_FILE}; it is not whole")
    if not any(folder.glob("tokenizer*.json")):
        raise UserError(f"{folder} has no tokenizer files, so it could not predict; convert it again with a tokenizer")
    return folder


def _altered(results: list[Results]) -> str:
    rows = ", ".join(f"{row.dataset} {row.split} ({row.alteration})" for row in results)
    return f"it has only {rows}" if rows else "it is empty"


def _message(results: list[Results]) -> str:
    if not results:
        return "Model"
    first = results[0]
    step = f"Step {first.provenance['step']}: " if "step" in first.provenance else ""
    name, value = next(iter(first.metrics.items()))
    return f"{step}{name} {value:.2f} on {first.dataset} {first.split}"


class PushProcess:
    """Pushes a model folder in a process of its own, which can be ended: a thread that hangs in the network cannot.

    The process has no GPU and is over after `LONGEST_PUSH` seconds at the latest.
    """

    def __init__(self, repo: str, *, private: bool, picture: bool = True, state: bool = False) -> None:
        flags = ["--private" if private else "--public", *([] if picture else ["--no_picture"])]
        flags += ["--state"] if state else []
        self.command = [repo, *flags, *import_flags()]
        self._running: subprocess.Popen[str] | None = None
        self._stopped = False

    def __call__(self, folder: Path) -> str:
        """Push and return the commit's address. Raises UserError."""
        command = [sys.executable, "-m", "amltrain", "push", str(folder), *self.command]
        with subprocess.Popen(
            command, env=_child_environment(), text=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        ) as self._running:  # fmt: skip
            if self._stopped:
                self._running.kill()
            try:
                said, complaints = self._running.communicate(timeout=LONGEST_PUSH)
            except subprocess.TimeoutExpired:
                self._running.kill()
                raise UserError(
                    f"the upload was not done after {LONGEST_PUSH / 60:.0f} minutes and was ended"
                ) from None
            code = self._running.returncode
        if code == 0:
            return said.strip().splitlines()[-1].removeprefix("pushed to ")
        if self._stopped:
            raise UserError("the upload was ended with the run")
        errors = [line.removeprefix("error: ") for line in complaints.splitlines() if line.startswith("error: ")]
        raise UserError(errors[-1] if errors else f"the pushing process ended with code {code}")

    def stop(self) -> None:
        """End a running upload; half an upload is never visible on the Hub."""
        self._stopped = True
        if self._running is not None and self._running.poll() is None:
            self._running.kill()


def _child_environment() -> dict[str, str]:
    """Return what this process knows of the Hub, without GPUs and without being a process of a distributed run."""
    constants = huggingface_hub.constants
    kept = {k: v for k, v in os.environ.items() if k not in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")}
    seen = {"HF_ENDPOINT": constants.ENDPOINT, "HF_HUB_CACHE": str(constants.HF_HUB_CACHE)}
    flags = {name: "1" if getattr(constants, name) else "0" for name in ("HF_HUB_DISABLE_XET", "HF_HUB_OFFLINE")}
    quiet = {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    return {**kept, **seen, **flags, **quiet}


class Version(NamedTuple):
    """A checkpoint as written at one time; rewritten (for example with its scores) it is a new version."""

    name: str
    written: int


def _version(checkpoint: Path) -> Version:
    return Version(checkpoint.name, (checkpoint / MODEL).stat().st_ctime_ns)


class Publisher:
    """Pushes checkpoints of a run in the background. Training never waits for it, and no failure of it stops training.

    What is pushed is first hard-linked, so that removing old checkpoints does not remove it. While a push is under
    way, only the newest checkpoint waits. A failed try is logged in one line.
    """

    def __init__(
        self,
        push: Callable[[Path], str],
        log: Callable[[str], None],
        stop: Callable[[], None] = lambda: None,
        *,
        state: bool = False,
    ) -> None:
        """push: pushes a folder and returns its address. log: called from another thread. stop: ends a push. state:
        what is pushed is the run up to a checkpoint, not the model in it alone.
        """
        self.push, self.log, self.stop, self.state = push, log, stop, state
        self._pushed: Version | None = None
        self._lock = threading.Lock()
        self._waiting: tuple[Version, Path] | None = None
        self._thread: threading.Thread | None = None

    def submit(self, checkpoint: Path) -> None:
        """Push `checkpoint/model` as soon as no other push is running; returns at once."""
        checkpoint = checkpoint.resolve()
        try:
            version = _version(checkpoint)
            copy = Path(tempfile.mkdtemp(prefix=f".{checkpoint.name}.", suffix=".pushing", dir=checkpoint.parent))
            if self.state:
                copy_run(checkpoint.parent, checkpoint, copy)
            else:
                shutil.copytree(checkpoint / MODEL, copy, copy_function=link_or_copy, dirs_exist_ok=True)
        except OSError as error:
            self.log(f"WARNING: {checkpoint.name} was not pushed to the Hub: {first_line(error)}; training continues")
            return
        with self._lock:
            replaced, self._waiting = self._waiting, (version, copy)
            if self._thread is None:
                # a daemon: a run that is asked to stop does not wait for an upload, and half an upload is never visible
                self._thread = threading.Thread(target=self._work, name="hub", daemon=True)
                self._thread.start()
        if replaced is not None:
            shutil.rmtree(replaced[1], ignore_errors=True)

    def finish(self, checkpoint: Path, advice: str) -> None:
        """Wait for running pushes, retry the run's final checkpoint if it is not there yet, and log the result.

        advice: what to do if it is not.
        """
        if not checkpoint.exists():
            self.log(f"WARNING: nothing is on the Hub: there is no {checkpoint}")
            return
        version = _version(checkpoint.resolve())
        deadline = time.monotonic() + LONGEST_WAIT
        self._wait(deadline)
        for pause in PAUSES:
            if self._pushed == version or self._thread is not None:
                break
            time.sleep(min(pause, max(0.0, deadline - time.monotonic())))
            if time.monotonic() >= deadline:
                break
            self.submit(checkpoint)
            self._wait(deadline)
        done = self._pushed == version
        self.close()
        self.log(f"{version.name} is on the Hub" if done else f"WARNING: {version.name} is NOT on the Hub; {advice}")

    def close(self) -> None:
        """End what is still running: nobody waits for it."""
        self.stop()

    def _wait(self, deadline: float) -> None:
        thread = self._thread
        if thread is not None:
            thread.join(max(0.0, deadline - time.monotonic()))

    def _work(self) -> None:
        while True:
            with self._lock:
                if self._waiting is None:
                    self._thread = None
                    return
                (version, folder), self._waiting = self._waiting, None
            try:
                address = self.push(folder)
                self._pushed = version
                self.log(f"pushed {version.name}: {address}")
            except Exception as error:  # whatever the error is, training continues
                self.log(f"WARNING: {version.name} was not pushed to the Hub: {first_line(error)}; training continues")
            shutil.rmtree(folder, ignore_errors=True)


def build_publisher(hub: HubConfig, log: Callable[[str], None]) -> Publisher | None:
    """Build the publisher of a run's checkpoints; None without one. Raises UserError as `check_access` does."""
    if hub.push == "never":
        return None
    repo = str(hub.repo)
    check_access(repo)
    disable_progress_bars()  # the run's own bar is on the screen
    hub_logging.set_verbosity_error()  # we log each failure once
    state = hub.push == STATE
    process = PushProcess(repo, private=hub.private, picture=hub.picture, state=state)
    return Publisher(process, log, process.stop, state=state)
