"""`train.dry_run`: a run of one step that leaves nothing behind."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from tqdm.auto import tqdm

from amltrain.config.schema import CheckpointConfig, HubConfig, RunConfig, TrackingConfig
from amltrain.data.prepare import read_manifest
from amltrain.errors import UserError
from amltrain.hub.push import check_access
from amltrain.training.checkpoint import find_resumable, step_of


@contextmanager
def dry_run(config: RunConfig) -> Iterator[RunConfig]:
    """Yield the config of a run of one step in a temporary folder, without trackers and pushes.

    Raises UserError where the real run would be refused, and for data that is not prepared yet: preparing it would
    leave files.
    """
    prepared = Path(config.data.prepared)
    missing = [name for name in config.data.datasets if read_manifest(prepared / name) is None]
    if missing and (prepared.exists() or config.data.prepared.count("/") != 1 or config.data.refer_root):
        raise UserError(
            f"{', '.join(missing)}: not prepared in {prepared}, and train.dry_run writes nothing; prepare the data "
            f"first (amltrain prepare, or a run without train.dry_run)"
        )
    if config.hub.push != "never":
        check_access(str(config.hub.repo))
    resume_from = find_resumable(config.folder, config.resume, tqdm.write) if config.folder.exists() else None
    first = 0 if resume_from is None else step_of(resume_from)
    with tempfile.TemporaryDirectory(prefix="amltrain-dry-run-") as folder:
        yield replace(
            config,
            output=folder,
            resume="auto" if resume_from is None else str(resume_from.resolve()),
            train=replace(
                config.train, max_steps=first + 1, epochs=None, stop_after=None, time_limit=None, log_every=1
            ),
            evaluation=replace(config.evaluation, max_samples=config.evaluation.batch_size, every_steps=first + 1),
            checkpoint=CheckpointConfig(),
            hub=HubConfig(),
            tracking=TrackingConfig(trackers=[]),
        )
        tqdm.write("dry run: one step trained, saved and evaluated in a temporary folder; nothing was kept")
