"""Resume a run: what it was (recipe, code, hardware), where it stands, and whether it may continue under its config."""

import functools
import json
import math
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType

from amltrain import __version__
from amltrain import run_folder as checkpoints
from amltrain.checkpoints.lock import OutputLock
from amltrain.checkpoints.saver import Saver
from amltrain.config.fields import FREE, LOCAL, SAID, keys_of_scope
from amltrain.config.parse import save_config
from amltrain.config.schema import MaskParts, RunConfig, free_options, sectioned
from amltrain.data.text import SentenceTokenizer
from amltrain.environment import code_commit, hardware, library_versions
from amltrain.errors import UserError, fits
from amltrain.hub.model_folder import read_training
from amltrain.hub.run_state import fetch_run
from amltrain.models import model_info
from amltrain.registry import METHODS
from amltrain.run_folder import (
    BEST,
    FINISHED_FILE,
    MODEL,
    RUN_CONFIG,
    SEEN_FILE,
    STATE,
    is_repository,
    mark_requeue,
    public_name,
)


def describe_training(config: RunConfig) -> dict[str, Any]:
    """JSON values: recipe, the method's options with its preset filled in, commit (None outside a git checkout),
    hardware, versions by library.
    """
    return {
        "recipe": recipe(config),
        "method_options": complete_options(config),
        "commit": code_commit(),
        "hardware": hardware(),
        "versions": library_versions(),
        "threads": torch.get_num_threads(),
    }


def complete_options(config: RunConfig) -> dict[str, Any]:
    """The method's options as JSON values, those of its preset filled in."""
    options = config.method_options if config.method_options is not None else METHODS.options(config.method)()
    complete = options.complete() if hasattr(options, "complete") else options
    values: dict[str, Any] = json.loads(json.dumps(asdict(complete), default=str))
    return values


def recipe(config: RunConfig) -> dict[str, Any]:
    """The run without what belongs to the machine it ran on. Files appear by name only: paths may be private.

    `data.mask_parts` is written out, since the targets depend on it.
    """
    values = sectioned(config)
    for key in keys_of_scope(RunConfig, LOCAL):
        *groups, name = key.split(".")
        functools.reduce(lambda inner, group: inner.get(group, {}), groups, values).pop(name, None)
    values["data"]["mask_parts"] = train_mask_parts(config)
    for key in ("vision_weights", "text_weights", "checkpoint"):
        values["model"][key] = _public(values["model"][key])
    values["preprocess"]["tokenizer"] = _public(values["preprocess"]["tokenizer"])
    values["data"]["held_out_ids"] = _public(values["data"]["held_out_ids"])
    return values


def _public(source: str | None) -> str | None:
    return None if source is None else public_name(source)


def train_mask_parts(config: RunConfig) -> MaskParts:
    """Return how the training masks treat overlapping polygons."""
    return config.data.mask_parts or model_info(config.model.name).protocol.mask_parts


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
    data            fingerprint of the training set's contents, which resuming must not change; "" = not known
    engine          what trained: no, multi_cpu, multi_gpu, fsdp, deepspeed, ... (Accelerate's names)
    callbacks       state of callbacks, by class name
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
    data: str = ""
    log_lines: int = 0
    window: Any = None
    losses: list[float] = field(default_factory=lambda: [0.0, 0])
    engine: str = ""
    callbacks: dict[str, Any] = field(default_factory=dict)

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
            raise UserError(
                f"{name} is damaged: a metric in its progress is not a number; resume from another checkpoint"
            )
        if not isinstance(saved.get("callbacks", {}), dict):
            raise UserError(f"{name} is damaged: its callbacks are not named; resume from another checkpoint")
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
        if before.data and self.data and before.data != self.data:
            raise UserError(
                f"{name} was made from other training data of as many samples; a resumed run continues with the same "
                f"data: set data.prepared and data.datasets back, or start a new run in another --output"
            )
        before.spread, before.engine, before.data = self.spread, self.engine, self.data
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
    return [
        value
        for key, value in saved.items()
        if key not in ("spread", "best", "window", "losses", "engine", "callbacks", "data")
    ]


TOKENIZER = "preprocess.tokenizer"
FIRST = ("model.name", "method")
"""Keys to compare first: others follow from them."""


def check_recipe(checkpoint: Path, config: RunConfig, log: Callable[[str], None]) -> None:
    """Compare a run's config with the one that the checkpoint was made with, and log what differs.

    Raises UserError naming the first key that a resumed run may not change.
    """
    training = read_training(checkpoint / MODEL)
    if training is None:
        return
    before = _flat(training["recipe"])
    if "aml.enabled" in before:
        raise UserError(
            f"{checkpoint} was made by amltrain 0.1, whose training state this version cannot resume; finish the run "
            f"with 0.1, or start a new run from its weights: another --output and --model.checkpoint "
            f"{checkpoint / MODEL}"
        )
    now = _flat(json.loads(json.dumps(recipe(config))))
    free = (*keys_of_scope(RunConfig, FREE), *free_options(config), *config.callback_options)
    if _same_tokenizer(checkpoint, config, before, now):
        free = (*free, "preprocess.tokenizer")
    for key in sorted(before.keys() | now.keys(), key=lambda key: (key not in FIRST, key)):
        if before.get(key) == now.get(key) or _belongs(key, free) or not _comparable(key, before, now):
            continue
        change = f"{checkpoint} was made with {key} {_shown(before, key)}, not {_shown(now, key)}"
        if key not in keys_of_scope(RunConfig, SAID):
            raise UserError(
                f"{change}; set it back, or start a new run in another --output (from these weights with "
                f"--model.checkpoint {checkpoint / MODEL})"
            )
        log(f"WARNING: {change}; the run continues with the new value")


def compare_surroundings(checkpoint: Path, evaluated: dict[str, str], log: Callable[[str], None]) -> None:
    """Say what else differs from where a checkpoint was made: versions, threads, the data that it is scored on.

    None of it may be a fault, and each can change the last digits or what `best` compares.
    """
    training = read_training(checkpoint / MODEL) or {}
    now = {**library_versions(), "CPU threads": torch.get_num_threads(), "code": code_commit()}
    versions = training.get("versions")
    before = dict(versions) if isinstance(versions, dict) else {}
    before |= {"CPU threads": training.get("threads"), "code": training.get("commit")}
    changed = [f"{key} {before[key]}, now {now[key]}" for key in now if before.get(key) not in (None, now[key])]
    if changed:
        log(f"WARNING: {checkpoint} was made with {'; '.join(changed)}: results may differ in their last digits")
    known = training.get("evaluated_fingerprints")
    for split, contents in evaluated.items():
        if isinstance(known, dict) and known.get(split, contents) != contents:
            log(
                f"WARNING: {checkpoint} was scored on other data of the split {split}: its metrics before and after "
                f"cannot be compared, and `best` compares them"
            )
    if not training.get("data_fingerprint"):
        log(f"WARNING: {checkpoint} does not know its training data's contents; only their number is compared")


def _same_tokenizer(checkpoint: Path, config: RunConfig, before: dict[str, Any], now: dict[str, Any]) -> bool:
    """Whether a tokenizer of another name has the vocabulary that the checkpoint was trained with."""
    name = config.preprocess.tokenizer
    if name is None or name == "wordpiece" or before.get(TOKENIZER) in (now.get(TOKENIZER), "wordpiece"):
        return False
    saved, given = (SentenceTokenizer.load(source).tokenizer for source in (checkpoint / MODEL, name))
    return saved.get_vocab() == given.get_vocab()


def resume_progress(saver: Saver, path: Path, new: Progress, output: Path, log: Callable[[str], None]) -> Progress:
    """Load a checkpoint and return the progress to continue with; every process calls.

    new: the progress of a new run with this config. Raises UserError if the run cannot continue from there.
    """
    accelerator, saved = saver.accelerator, checkpoints.load_trainer_state(path)
    progress = new.resumed(saved, str(path))
    if saved["spread"] != progress.spread:
        before, now = (" x ".join(map(str, spread)) for spread in (saved["spread"], progress.spread))
        log(f"the run was spread {before} (processes x micro x accumulated) and continues as {now}")
        if accelerator.distributed_type == DistributedType.DEEPSPEED and saved["spread"][0] != progress.spread[0]:
            raise UserError(
                f"{path} was saved by DeepSpeed on {saved['spread'][0]} processes, and DeepSpeed resumes on that many "
                f"only; start as many, or start a new run from {path}/model with --model.checkpoint"
            )
    saver.load(path)
    accelerator.step = 0  # it counts micro-batches, of which a step may now have another number
    if path.resolve().parent != output.resolve():  # a branch: `best`, the log and the checkpoint stay where they are
        progress.best, progress.worse_in_a_row, progress.log_lines, progress.saved = -math.inf, 0, 0, -1
    elif progress.best_step == progress.step and accelerator.is_main_process:
        checkpoints.point(output, BEST, path)  # a kill may have come between saving and pointing
    log(f"resuming from {path} at step {progress.step}")
    return progress


def _comparable(key: str, before: dict[str, Any], now: dict[str, Any]) -> bool:
    """A key that only one of the two has belongs to another version of amltrain, unless users name such keys."""
    return (key in before and key in now) or ".kwargs." in key


def _belongs(key: str, names: tuple[str, ...]) -> bool:
    return any(key == name or key.startswith(f"{name}.") for name in names)


def _shown(values: dict[str, Any], key: str) -> str:
    return json.dumps(values.get(key)).strip('"')


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested keys joined by dots."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def prepare_output(config: RunConfig, log: Callable[[str], None], lock: OutputLock) -> Path | None:
    """Make the folder ready and lock it, on the main process; the checkpoint to resume from. Raises UserError."""
    output = config.folder
    if (output / checkpoints.MANIFEST).is_file():
        raise UserError(f"{output} is a checkpoint; resume its run with --output {output.parent}, or choose another")
    made = not output.exists()
    try:
        output.mkdir(parents=True, exist_ok=True)
        lock.acquire()
        (output / SEEN_FILE).touch()
        resume = config.resume
        if is_repository(resume):
            fetch_run(resume, output, log)
            resume = "auto"
        elif resume == "auto" and config.hub.push == STATE:
            fetch_run(str(config.hub.repo), output, log, may_be_new=True)
        resume_from = checkpoints.find_resumable(output, resume, log)
        if resume_from is not None:
            try:
                check_recipe(resume_from, config, log)
            except UserError as error:
                hint = "; the Hub has that run: for a new one name another --hub.repo and another --output"
                raise UserError(f"{error}{hint if config.hub.push == STATE else ''}") from error
        checkpoints.remove_leftovers(output)
        mark_requeue(output, False)
        (output / FINISHED_FILE).unlink(missing_ok=True)
    except OSError as error:
        raise _unwritable(output, error) from error
    except UserError:
        if made:  # a rejected start leaves no empty folder
            (output / SEEN_FILE).unlink(missing_ok=True)
            lock.release()
            with suppress(OSError):
                output.rmdir()
        raise
    return resume_from


def check_shared(accelerator: Accelerator, output: Path) -> None:
    """Every machine must see what the main process writes, or a checkpoint would be incomplete."""
    seen = (output / SEEN_FILE).is_file()
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        (output / SEEN_FILE).unlink(missing_ok=True)
    if not seen:
        raise UserError(f"{output} is not shared by all machines; choose an --output on a common file system")


def write_config(config: RunConfig) -> None:
    """Write config.yaml, once a run has started: a rejected start must not replace the record of an earlier run."""
    try:
        save_config(config, config.folder / RUN_CONFIG, _head(config))
    except OSError as error:
        raise _unwritable(config.folder, error) from error


def _head(config: RunConfig) -> list[str]:
    """The first lines of config.yaml: which code wrote it, and the method's options that its preset fills in."""
    options = [f"{name} {json.dumps(value)}" for name, value in complete_options(config).items() if value is not None]
    filled = f"{config.method} with its preset and defaults: {', '.join(options)}" if options else config.method
    return [
        f"the run again: amltrain train --config {config.folder / RUN_CONFIG} --output OTHER",
        f"amltrain {__version__}, commit {code_commit() or 'unknown'}; {hardware()}",
        filled,
    ]


def _unwritable(output: Path, error: OSError) -> UserError:
    return UserError(f"cannot write to {output}: {error.strerror}; choose another --output")
