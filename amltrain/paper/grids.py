"""Convergence (Table 14): the mean training loss of every epoch, from the log of a run.

Scores of several models, of one or several seeds each, under several conditions: robustness (Table 15) and
occlusion (Fig. 4b).
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from amltrain.errors import UserError, fits
from amltrain.evaluation.tables import cell, markdown
from amltrain.paper.figures import COLOURS, saved_figure
from amltrain.run_folder import LOG_FILE, read_log


def read_epoch_losses(place: str | Path) -> dict[int, float]:
    """Mean loss of every whole epoch, by its last step, as the run logged it; empty for a run of an older version."""
    rows = _read_lines(place)
    return {int(row["step"]): float(row["epoch_loss"]) for row in rows if row.get("epoch_loss") is not None}


def read_losses(place: str | Path) -> list[tuple[int, float]]:
    """(step, loss) of every log line of a run. place: a run, or a checkpoint or model folder in it.

    Raises UserError if the log is missing or has no loss.
    """
    losses = [(int(row["step"]), float(row["loss"])) for row in _read_lines(place) if row.get("loss") is not None]
    if not losses:
        raise UserError(f"the {LOG_FILE} of {place} holds no loss yet; let the run log a few steps (train.log_every)")
    return losses


def _read_lines(place: str | Path) -> list[dict[str, Any]]:
    folder = next((p for p in (Path(place), *Path(place).resolve().parents[:2]) if (p / LOG_FILE).is_file()), None)
    if folder is None:
        raise UserError(f"{place} has no {LOG_FILE}; convergence needs the folder of a run")
    rows = []
    for row in read_log(folder):
        numbers = [row.get(key) for key in ("loss", "epoch_loss")]
        if all(number is None or fits(number, float) for number in numbers):
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


Seeds = list[float]
"""Percent, one value per seed."""
Grid = dict[str, dict[str, dict[str, Seeds]]]
"""place (data set and split) -> condition -> model -> its seeds; the first condition is the clean image."""


def robustness_table(grid: Grid, metric: str) -> str:
    """Return a row per condition, then the average over the perturbations; differences are to the first model.

    Several seeds: mean and standard deviation over them; differences are those of the means.
    """
    lines = []
    for place, conditions in grid.items():
        models = list(next(iter(conditions.values())))
        clean, *perturbed = conditions
        rows = [(condition, *_with_differences(values, models)) for condition, values in conditions.items()]
        means = {m: np.mean([conditions[c][m] for c in perturbed], axis=0).tolist() for m in models}
        rows.append((f"average of {len(perturbed)}", *_with_differences(means, models)))
        drops = {m: np.subtract(means[m], conditions[clean][m]).tolist() for m in models}
        rows.append(("average - clean", *_with_differences(drops, models)))
        lines += [*markdown([(f"{place}, {metric}", *_header(models)), *rows], text_columns=1), ""]
    return "\n".join(lines)


def level_table(grid: Grid, metric: str) -> str:
    """Return a row per level, with every model's drop from the first level; several seeds as in `robustness_table`."""
    lines = []
    for place, conditions in grid.items():
        models = list(next(iter(conditions.values())))
        first = next(iter(conditions.values()))
        header = [f"{place}, {metric}", *(title for m in models for title in (m, f"{m}: drop"))]
        rows = [
            (level, *(text for m in models for text in (over_seeds(values[m]), _drop(values[m], first[m]))))
            for level, values in conditions.items()
        ]
        lines += [*markdown([header, *rows], text_columns=1), ""]
    return "\n".join(lines)


def over_seeds(values: Sequence[float]) -> str:
    """Mean and sample standard deviation, or the only value."""
    mean = cell(float(np.mean(values)))
    return f"{mean} ± {np.std(values, ddof=1):.2f}" if len(values) > 1 else mean


def _drop(values: Seeds, first: Seeds) -> str:
    drops = np.subtract(values, first)
    return f"{drops.mean():+.2f}" + (f" ± {drops.std(ddof=1):.2f}" if len(drops) > 1 else "")


def _header(models: Sequence[str]) -> list[str]:
    return [*models, *(f"{m} - {models[0]}" for m in models[1:])]


def _with_differences(values: dict[str, Seeds], models: Sequence[str]) -> list[str]:
    means = {m: float(np.mean(values[m])) for m in models}
    return [*(over_seeds(values[m]) for m in models), *(f"{means[m] - means[models[0]]:+.2f}" for m in models[1:])]


def _means(
    conditions: dict[str, dict[str, Seeds]], model: str
) -> tuple[NDArray[np.float64], NDArray[np.float64] | None]:
    """Mean and standard deviation of every condition; None for the latter where there is one seed."""
    values = np.array([values[model] for values in conditions.values()])
    return values.mean(axis=1), values.std(axis=1, ddof=1) if values.shape[1] > 1 else None


def draw_rows(grid: Grid, metric: str, path: Path) -> None:
    """Bars of every condition, one panel per place; several seeds: means with standard deviations."""
    with saved_figure(path, (9, 3.2 * len(grid))) as figure:
        for axes, (place, conditions) in zip(
            figure.subplots(len(grid), 1, squeeze=False).flat, grid.items(), strict=True
        ):
            models = list(next(iter(conditions.values())))
            at, width = np.arange(len(conditions)), 0.8 / len(models)
            for i, model in enumerate(models):
                heights, spread = _means(conditions, model)
                axes.bar(at + i * width, heights, width, label=model, color=COLOURS[i % len(COLOURS)])
                if spread is not None:
                    axes.errorbar(at + i * width, heights, spread, fmt="none", ecolor="#333333", elinewidth=0.8)
                tops = heights if spread is None else heights + spread
                for x, top, height in zip(at + i * width, tops, heights, strict=True):
                    axes.annotate(f"{height:.1f}", (x, top), (0, 2), textcoords="offset points", ha="center", size=6)
            axes.set_xticks(at + width * (len(models) - 1) / 2, [c.replace("_", " ") for c in conditions])
            axes.set_ylabel(f"{metric} (%)")
            axes.set_title(place, loc="left")
            axes.spines[["top", "right"]].set_visible(False)
            axes.legend(frameon=False, ncols=len(models), loc="upper right", bbox_to_anchor=(1, 1.15))


def draw_levels(grid: Grid, levels: Sequence[float], metric: str, path: Path) -> None:
    """A line per model over the covered share, one panel per place; several seeds: means with standard deviations."""
    with saved_figure(path, (4.5 * len(grid), 3.6)) as figure:
        for axes, (place, conditions) in zip(
            figure.subplots(1, len(grid), squeeze=False).flat, grid.items(), strict=True
        ):
            for i, model in enumerate(next(iter(conditions.values()))):
                scores, spread = _means(conditions, model)
                colour = COLOURS[i % len(COLOURS)]
                axes.errorbar(levels, scores, spread, marker="o", capsize=3, label=model, color=colour)
                # scores fall from left to right: above right and below left no line passes
                offset, side = ((-4, -10), "right") if i % 2 else ((4, 5), "left")
                for level, score in zip(levels, scores, strict=True):
                    axes.annotate(f"{score:.1f}", (level, score), offset, textcoords="offset points", ha=side, size=8)
            axes.set_xlabel("share of the image covered (%)")
            axes.set_xticks(levels)
            axes.margins(x=0.12, y=0.15)
            axes.set_ylabel(f"{metric} (%)")
            axes.set_title(place, loc="left")
            axes.spines[["top", "right"]].set_visible(False)
            axes.legend(frameon=False)
