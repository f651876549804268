"""A run's output folder: made, checked for what it holds, and left as it is until the run is known to start."""

from collections.abc import Callable
from pathlib import Path

from accelerate import Accelerator

from amltrain.config import RunConfig, save_config
from amltrain.errors import UserError
from amltrain.training import checkpoint as checkpoints
from amltrain.training.continuity import check_recipe
from amltrain.training.interruption import mark_requeue

PROBE = ".seen-by-all"


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
