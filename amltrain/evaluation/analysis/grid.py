"""Scores of several models, of one or several seeds each, under several conditions: robustness (Table 15) and
occlusion (Fig. 4b)."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from amltrain.evaluation.analysis.figures import COLOURS, saved_figure
from amltrain.evaluation.tables import cell, markdown

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
