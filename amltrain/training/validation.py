"""Evaluation during a run: score every split, write, draw and log the results."""

from typing import Any

from accelerate import Accelerator
from torch import nn
from tqdm.auto import tqdm

from amltrain.config.schema import EvaluationConfig, RunConfig
from amltrain.errors import UserError, unknown_name
from amltrain.evaluation.evaluator import evaluate_model
from amltrain.evaluation.metrics import list_metrics
from amltrain.evaluation.results import Results, write_results
from amltrain.evaluation.tables import table
from amltrain.hub.model_folder import RESULTS_FILE
from amltrain.training.build import RunComponents
from amltrain.training.checkpoint import checkpoint_name


def evaluate_splits(
    accelerator: Accelerator, model: nn.Module, components: RunComponents, config: RunConfig, step: int
) -> tuple[dict[str, float], list[Results]]:
    """Score every split; the main process writes results.json and pictures. Returns `split/metric` -> percent, results.

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
        write_results(config.folder / RESULTS_FILE, results)
        for name, result in scored.items():
            if result.predictions:
                from amltrain.evaluation.pictures import prediction_sheet, save_picture  # matplotlib takes a second

                picture = f"{checkpoint_name(step)}-{name.replace(':', '-')}.png"
                sheet = prediction_sheet(result, components.eval_loaders[name].dataset)
                save_picture(sheet, config.folder / "pictures" / picture)
    values = {f"{name}/{metric}": value for name, result in scored.items() for metric, value in result.metrics.items()}
    return values, results


def check_metric_name(evaluation: EvaluationConfig) -> None:
    """Raise UserError for a best_metric that does not exist."""
    metric = evaluation.best_metric.rpartition("/")[2]
    if metric not in list_metrics():
        raise unknown_name("evaluation.best_metric", metric, list_metrics())


def check_best_metric(evaluation: EvaluationConfig, splits: list[str]) -> None:
    """Raise UserError for a best_metric of a split that is not evaluated."""
    split = evaluation.best_metric.rpartition("/")[0]
    if split and split not in splits:
        raise UserError(f"evaluation.best_metric names split {split!r}; evaluated are {', '.join(splits)}")


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
