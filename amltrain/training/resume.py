"""Opens a run's output folder and decides whether the run may resume there under its current config."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from amltrain.config.parse import save_config
from amltrain.config.schema import RunConfig, free_options
from amltrain.errors import UserError
from amltrain.hub.model_folder import read_training
from amltrain.training import checkpoint as checkpoints
from amltrain.training.preemption import mark_requeue
from amltrain.training.provenance import recipe

PROBE = ".seen-by-all"
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
    "train.time_limit",
)
"""Keys and groups of keys that change nothing about what is learnt."""
FIRST = ("model.name", "method")
"""Keys to compare first: others follow from them."""
SAID = ("train.epochs", "train.max_steps", "train.mixed_precision")
"""Keys that do, and that one may mean to change: the length of the run, with its schedule, and the precision."""


def check_recipe(checkpoint: Path, config: RunConfig, say: Callable[[str], None]) -> None:
    """Compare a run's config with the one that the checkpoint was made with, and say what differs.

    Raises UserError naming the first key that a resumed run may not change.
    """
    training = read_training(checkpoint / "model")
    if training is None:
        return
    before = _flat(training["recipe"])
    if "aml.enabled" in before:
        raise UserError(
            f"{checkpoint} was made by amltrain 0.1, whose training state this version cannot resume; finish the run "
            f"with 0.1, or start a new run from its weights: another --output and --model.checkpoint "
            f"{checkpoint / 'model'}"
        )
    now = _flat(json.loads(json.dumps(recipe(config))))
    free = (*FREE, *free_options(config))
    for key in sorted(before.keys() | now.keys(), key=lambda key: (key not in FIRST, key)):
        if before.get(key) == now.get(key) or _belongs(key, free) or not _comparable(key, before, now):
            continue
        change = f"{checkpoint} was made with {key} {_shown(before, key)}, not {_shown(now, key)}"
        if key not in SAID:
            raise UserError(
                f"{change}; set it back, or start anew in another --output (from these weights with "
                f"--model.checkpoint {checkpoint / 'model'})"
            )
        say(f"WARNING: {change}; the run goes on with the new value")


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


def prepare_output(config: RunConfig, say: Callable[[str], None]) -> Path | None:
    """Make the folder ready, on the main process; the checkpoint to go on from. Raises UserError."""
    output = Path(config.output)
    try:
        output.mkdir(parents=True, exist_ok=True)
        (output / PROBE).touch()
        resume_from = checkpoints.find_resumable(output, config.resume, say)
        if resume_from is not None:
            check_recipe(resume_from, config, say)
        checkpoints.remove_leftovers(output)
        mark_requeue(output, False)
    except OSError as error:
        raise _unwritable(output, error) from error
    return resume_from


def check_shared(accelerator: Accelerator, output: Path) -> None:
    """Every machine must see what the main process writes, or some of a checkpoint would lie elsewhere."""
    seen = (output / PROBE).is_file()
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        (output / PROBE).unlink(missing_ok=True)
    if not seen:
        raise UserError(f"{output} is not shared by all machines; choose an --output on a common file system")


def write_config(config: RunConfig) -> None:
    """Write config.yaml, once a run has started: a refused start must not replace the record of an earlier run."""
    try:
        save_config(config, Path(config.output) / "config.yaml")
    except OSError as error:
        raise _unwritable(Path(config.output), error) from error


def _unwritable(output: Path, error: OSError) -> UserError:
    return UserError(f"cannot write to {output}: {error.strerror}; choose another --output")
