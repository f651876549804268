"""Opens a run's output folder and decides whether the run may resume there under its current config."""

import json
import math
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import DistributedType

from amltrain import run_folder as checkpoints
from amltrain.checkpoints.lock import OutputLock
from amltrain.checkpoints.progress import Progress
from amltrain.checkpoints.provenance import recipe
from amltrain.checkpoints.saver import Saver
from amltrain.config.parse import save_config
from amltrain.config.schema import RunConfig, free_options
from amltrain.data.text import SentenceTokenizer
from amltrain.errors import UserError
from amltrain.hub.model_folder import read_training
from amltrain.run_folder import BEST, FINISHED_FILE, MODEL, RUN_CONFIG, SEEN_FILE, mark_requeue

TOKENIZER = "preprocess.tokenizer"
FREE = (
    "checkpoint",
    "data.max_skipped",
    "data.streaming",
    "evaluation.batch_size",
    "evaluation.every_steps",
    "evaluation.max_samples",
    "evaluation.patience",
    "evaluation.pictures",
    "evaluation.protocol",
    "evaluation.shuffle_sentences",
    "evaluation.splits",
    "model.gradient_checkpointing",
    "train.collective_timeout",
    "train.compile",
    "train.log_every",
    "train.max_bad_steps",
    "train.micro_batch_size",
    "train.stop_after",
    "train.time_limit",
    "train.tf32",
    "model.allow_random_frozen",
)
"""Keys and groups of keys that do not affect training."""
FIRST = ("model.name", "method")
"""Keys to compare first: others follow from them."""
SAID = ("train.epochs", "train.max_steps", "train.mixed_precision")
"""Keys that do, but that a user may want to change: the length of the run, with its schedule, and the precision."""


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
    free = (*FREE, *free_options(config))
    if _same_tokenizer(checkpoint, config, before, now):
        free = (*free, "preprocess.tokenizer")
    for key in sorted(before.keys() | now.keys(), key=lambda key: (key not in FIRST, key)):
        if before.get(key) == now.get(key) or _belongs(key, free) or not _comparable(key, before, now):
            continue
        change = f"{checkpoint} was made with {key} {_shown(before, key)}, not {_shown(now, key)}"
        if key not in SAID:
            raise UserError(
                f"{change}; set it back, or start a new run in another --output (from these weights with "
                f"--model.checkpoint {checkpoint / MODEL})"
            )
        log(f"WARNING: {change}; the run continues with the new value")


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
    made = not output.exists()
    try:
        output.mkdir(parents=True, exist_ok=True)
        lock.acquire()
        (output / SEEN_FILE).touch()
        resume_from = checkpoints.find_resumable(output, config.resume, log)
        if resume_from is not None:
            check_recipe(resume_from, config, log)
        checkpoints.remove_leftovers(output)
        mark_requeue(output, False)
        (output / FINISHED_FILE).unlink(missing_ok=True)
    except OSError as error:
        raise _unwritable(output, error) from error
    except UserError:
        if made:  # a refused start leaves no empty folder
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
    """Write config.yaml, once a run has started: a refused start must not replace the record of an earlier run."""
    try:
        save_config(config, config.folder / RUN_CONFIG)
    except OSError as error:
        raise _unwritable(config.folder, error) from error


def _unwritable(output: Path, error: OSError) -> UserError:
    return UserError(f"cannot write to {output}: {error.strerror}; choose another --output")
