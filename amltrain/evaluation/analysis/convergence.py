"""Convergence (Table 14): the mean training loss of every epoch, from the log of a run."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from amltrain.errors import UserError, fits
from amltrain.evaluation.analysis.figures import COLOURS, saved_figure
from amltrain.evaluation.tables import markdown

LOG = "log.jsonl"


def read_epoch_losses(place: str | Path) -> dict[int, float]:
    """Mean loss of every whole epoch, by its last step, as the run logged it; empty for a run of an older version."""
    rows = _read_lines(place)
    return {int(row["step"]): float(row["epoch_loss"]) for row in rows if row.get("epoch_loss") is not None}


def read_log(place: str | Path) -> list[tuple[int, float]]:
    """(step, loss) of every log line of a run. place: a run, or a checkpoint or model folder in it.

    Raises UserError if the log is missing or has no loss.
    """
    losses = [(int(row["step"]), float(row["loss"])) for row in _read_lines(place) if row.get("loss") is not None]
    if not losses:
        raise UserError(f"the {LOG} of {place} holds no loss yet; let the run log a few steps (train.log_every)")
    return losses


def _read_lines(place: str | Path) -> list[dict[str, Any]]:
    folder = next((p for p in (Path(place), *Path(place).resolve().parents[:2]) if (p / LOG).is_file()), None)
    if folder is None:
        raise UserError(f"{place} has no {LOG}; convergence needs the folder of a run")
    rows = []
    for line in (folder / LOG).read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):  # a run that was killed leaves half a line
            continue
        numbers = [row.get(key) for key in ("loss", "epoch_loss")] if isinstance(row, dict) else []
        if numbers and fits(row.get("step"), int) and all(n is None or fits(n, float) for n in numbers):
            rows.append(row)
    return rows


def steps_per_epoch(place: str | Path, data: Mapping[str, Any], global_batch_size: int) -> float:
    """Optimizer steps of an epoch, from the manifests of the prepared data.

    data: of the run's recipe, with `prepared`. Raises UserError if the data are missing.
    """
    unit = "refs" if data.get("train_unit") == "referent" else "expressions"
    samples = 0
    for name in data.get("datasets", []):
        path = Path(data.get("prepared", "")) / name / "manifest.json"
        try:
            samples += json.loads(path.read_text(encoding="utf-8"))["splits"][data["train_split"]][unit]
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise UserError(
                f"the length of an epoch of {place} is unknown: {path} is gone; prepare it again"
            ) from error
    if not samples:
        raise UserError(f"{place} does not record its training data, so the length of its epochs is unknown")
    return max(1.0, samples / global_batch_size)


def epoch_losses(losses: Sequence[tuple[int, float]], epoch_steps: float) -> list[float]:
    """Mean of the logged losses of every epoch; NaN for an epoch without a log line.

    A run logs the loss of single steps (every train.log_every), so this is a sample of an epoch's steps.
    """
    epochs = [int((step - 1) // epoch_steps) for step, _ in losses]
    values = np.array([loss for _, loss in losses])
    return [
        float(np.mean(values[np.equal(epochs, e)])) if e in epochs else float("nan") for e in range(max(epochs) + 1)
    ]


def convergence_table(losses: Mapping[str, Sequence[float]]) -> str:
    """At most 20 rows, evenly spread over the epochs with a logged loss; differences to the first model."""
    models = list(losses)
    logged = sorted({e for values in losses.values() for e, value in enumerate(values, 1) if not np.isnan(value)})
    places = np.linspace(0, len(logged) - 1, min(len(logged), 20)).round().astype(int).tolist()
    shown = [logged[place] for place in sorted(set(places))]
    header = ["epoch", *models, *(f"{m} - {models[0]}" for m in models[1:])]
    rows = []
    for epoch in shown:
        at = [values[epoch - 1] if epoch <= len(values) else float("nan") for values in losses.values()]
        cells = [_number(value) for value in (*at, *(value - at[0] for value in at[1:]))]
        rows.append([str(epoch), *cells])
    note = "Mean of the training losses of an epoch; with AML they are losses on masked images (see analyse losses)."
    return "\n".join([*markdown([header, *rows], text_columns=1), "", note])


def _number(value: float) -> str:
    return "-" if np.isnan(value) else f"{value:.4f}"


def draw_convergence(losses: Mapping[str, Sequence[float]], path: Path) -> None:
    """Loss over epochs, one line per model."""
    from matplotlib.ticker import MaxNLocator

    with saved_figure(path, (6, 4)) as figure:
        axes = figure.subplots()
        for i, (model, values) in enumerate(losses.items()):
            axes.plot(range(1, len(values) + 1), values, marker=".", label=model, color=COLOURS[i % len(COLOURS)])
        axes.set_xlabel("epoch")
        axes.set_ylabel("mean training loss")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)


def losses_table(losses: Mapping[str, Mapping[int, float]]) -> str:
    """A row per checkpoint step, a column per run; "-" where a run has no checkpoint of that step."""
    steps = sorted({step for values in losses.values() for step in values})
    nothing = float("nan")
    rows = [(f"{step:,}", *(_number(values.get(step, nothing)) for values in losses.values())) for step in steps]
    return "\n".join(markdown([("step", *losses), *rows], text_columns=1))


def draw_losses(losses: Mapping[str, Mapping[int, float]], path: Path) -> None:
    """Loss over steps, one line per run."""
    with saved_figure(path, (6, 4)) as figure:
        axes = figure.subplots()
        for i, (run, values) in enumerate(losses.items()):
            axes.plot(list(values), list(values.values()), marker=".", label=run, color=COLOURS[i % len(COLOURS)])
        axes.set_xlabel("step")
        axes.set_ylabel("mean loss on whole images")
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
