"""Evaluation in the course of a run: every split scored, written down, drawn and said."""

from pathlib import Path
from typing import Any

from accelerate import Accelerator
from torch import nn

from amltrain.config.schema import EvaluationConfig, RunConfig
from amltrain.errors import UserError, unknown_name
from amltrain.evaluation.evaluator import evaluate_model
from amltrain.evaluation.metrics import list_metrics
from amltrain.evaluation.results import Results, write_results
from amltrain.evaluation.tables import table
from amltrain.hub.model_folder import RESULTS_FILE
from amltrain.training.build import Parts
from amltrain.training.checkpoint import checkpoint_name
from amltrain.training.tracking import say


def evaluate_splits(
    accelerator: Accelerator, model: nn.Module, parts: Parts, config: RunConfig, step: int
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
        name: evaluate_model(accelerator, model, loader, parts.protocol, pictures=pictures, provenance=provenance)
        for name, loader in parts.eval_loaders.items()
    }
    results = list(scored.values())
    say(accelerator, f"step {step}\n{table(results)}")
    if accelerator.is_main_process:
        write_results(Path(config.output) / RESULTS_FILE, results)
        for name, result in scored.items():
            if result.predictions:
                from amltrain.evaluation.pictures import prediction_sheet, save_picture  # matplotlib takes a second

                picture = f"{checkpoint_name(step)}-{name.replace(':', '-')}.png"
                sheet = prediction_sheet(result, parts.eval_loaders[name].dataset)
                save_picture(sheet, Path(config.output) / "pictures" / picture)
    values = {f"{name}/{metric}": value for name, result in scored.items() for metric, value in result.metrics.items()}
    return values, results


def check_best_metric(evaluation: EvaluationConfig, splits: list[str]) -> None:
    """Refuse, before any training, a best_metric that no evaluation will give."""
    split, _, metric = evaluation.best_metric.rpartition("/")
    if metric not in list_metrics():
        raise unknown_name("evaluation.best_metric", metric, list_metrics())
    if split and split not in splits:
        raise UserError(f"evaluation.best_metric names split {split!r}; evaluated are {', '.join(splits)}")


def best_value(results: list[Results], splits: list[str], evaluation: EvaluationConfig) -> float:
    """The metric that chooses the best checkpoint: `metric` of the first split, or `split/metric`."""
    split, _, metric = evaluation.best_metric.rpartition("/")
    return results[splits.index(split) if split else 0].score(metric)
