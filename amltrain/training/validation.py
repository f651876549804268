"""Evaluation during a run: score every split, write, draw and log the results.

`train.dry_run`: a run of one step that leaves nothing behind.
"""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from torch import nn
from tqdm.auto import tqdm

from amltrain.config.schema import CheckpointConfig, EvaluationConfig, HubConfig, RunConfig, TrackingConfig
from amltrain.data.prepare import read_manifest
from amltrain.errors import UserError
from amltrain.evaluation.evaluator import evaluate_model
from amltrain.evaluation.results import Results, write_results
from amltrain.evaluation.samples import sample_table, write_samples
from amltrain.evaluation.tables import table
from amltrain.hub.push import check_access
from amltrain.run_folder import RESULTS_FILE, SAMPLES, find_resumable, step_of
from amltrain.training.build import RunComponents


def evaluate_splits(
    accelerator: Accelerator, model: nn.Module, components: RunComponents, config: RunConfig, step: int
) -> dict[str, Results]:
    """Score every split; the main process writes results.json and the rows per sample. Returns the results by split.

    model: whole, on the accelerator's device.
    """
    provenance: dict[str, Any] = {
        "model": config.model.name,
        "step": step,
        "seed": config.seed,
        "trained_on": config.data.datasets,
        "train_split": config.data.train_split,
        "leak_filter": config.data.leak_filter,
        "weights": "raw" if config.train.ema_decay is None else "ema",
        "max_samples": config.evaluation.max_samples,
    }
    pictures = config.evaluation.pictures
    scored = {
        name: evaluate_model(accelerator, model, loader, components.protocol, pictures=pictures, provenance=provenance)
        for name, loader in components.eval_loaders.items()
    }
    results = list(scored.values())
    if accelerator.is_main_process:
        tqdm.write(f"step {step}\n{table(results)}")
        named = [replace(result, files={"samples": f"{SAMPLES}/{result.stem()}.parquet"}) for result in results]
        for result, loader in zip(named, components.eval_loaders.values(), strict=True):
            write_samples(config.folder / result.files["samples"], sample_table(result, loader.dataset))
        write_results(config.folder / RESULTS_FILE, named)
    return scored


def zero_score_hint(value: float, config: RunConfig, total_steps: int) -> str | None:
    """A warning when the metric that chooses `best` is 0, except in a dry run: such a checkpoint is of no use."""
    if value > 0 or config.train.dry_run:
        return None
    return (
        f"WARNING: {config.evaluation.best_metric} is {value:.2f}: the model predicts no referent yet. If it stays so, "
        f"train longer than {total_steps:,} steps, or look at the learning rate (optim.lr {config.optim.lr:g}), the "
        f"pretrained weights and {config.folder / 'pictures'}"
    )


def best_value(results: list[Results], splits: list[str], evaluation: EvaluationConfig) -> float:
    """The metric that chooses the best checkpoint: `metric` of the first split, or `split/metric`."""
    split, _, metric = evaluation.best_metric.rpartition("/")
    return results[splits.index(split) if split else 0].score(metric)


@contextmanager
def dry_run(config: RunConfig) -> Iterator[RunConfig]:
    """Yield the config of a run of one step in a temporary folder, without trackers and pushes.

    Raises UserError where the real run would be rejected, and for data that is not prepared yet: preparing it would
    leave files.
    """
    prepared = Path(config.data.prepared)
    missing = [name for name in config.data.datasets if read_manifest(prepared / name) is None]
    if missing and (prepared.exists() or config.data.prepared.count("/") != 1 or config.data.refer_root):
        raise UserError(
            f"{', '.join(missing)}: not prepared in {prepared}, and train.dry_run writes nothing; prepare the data "
            f"first (amltrain data prepare, or a run without train.dry_run)"
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
