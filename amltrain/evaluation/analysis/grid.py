"""Scores of several models under several conditions: robustness (Table 15) and occlusion (Fig. 4b)."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from amltrain.evaluation.analysis.figures import COLOURS, saved_figure
from amltrain.evaluation.tables import cell, markdown

Grid = dict[str, dict[str, dict[str, float]]]
"""place (data set and split) -> condition -> model -> percent; the first condition is the clean image."""


def robustness_table(grid: Grid, metric: str) -> str:
    """Return a row per condition, then the average over the perturbations; differences are to the first model."""
    lines = []
    for place, conditions in grid.items():
        models = list(next(iter(conditions.values())))
        clean, *perturbed = conditions
        rows = [(condition, *_with_differences(values, models)) for condition, values in conditions.items()]
        means = {m: float(np.mean([conditions[c][m] for c in perturbed])) for m in models}
        rows.append((f"average of {len(perturbed)}", *_with_differences(means, models)))
        drops = {m: means[m] - conditions[clean][m] for m in models}
        rows.append(("average - clean", *_with_differences(drops, models)))
        lines += [*markdown([(f"{place}, {metric}", *_header(models)), *rows], text_columns=1), ""]
    return "\n".join(lines)


def level_table(grid: Grid, metric: str) -> str:
    """Return a row per level, with every model's drop from the first level."""
    lines = []
    for place, conditions in grid.items():
        models = list(next(iter(conditions.values())))
        first = next(iter(conditions.values()))
        header = [f"{place}, {metric}", *(title for m in models for title in (m, f"{m}: drop"))]
        rows = [
            (level, *(text for m in models for text in (cell(values[m]), f"{values[m] - first[m]:+.2f}")))
            for level, values in conditions.items()
        ]
        lines += [*markdown([header, *rows], text_columns=1), ""]
    return "\n".join(lines)


def _header(models: Sequence[str]) -> list[str]:
    return [*models, *(f"{m} - {models[0]}" for m in models[1:])]


def _with_differences(values: dict[str, float], models: Sequence[str]) -> list[str]:
    return [*(cell(values[m]) for m in models), *(f"{values[m] - values[models[0]]:+.2f}" for m in models[1:])]


def draw_rows(grid: Grid, metric: str, path: Path) -> None:
    """Bars of every condition, one panel per place."""
    with saved_figure(path, (9, 3.2 * len(grid))) as figure:
        for axes, (place, conditions) in zip(
            figure.subplots(len(grid), 1, squeeze=False).flat, grid.items(), strict=True
        ):
            models = list(next(iter(conditions.values())))
            at, width = np.arange(len(conditions)), 0.8 / len(models)
            for i, model in enumerate(models):
                heights = [values[model] for values in conditions.values()]
                bars = axes.bar(at + i * width, heights, width, label=model, color=COLOURS[i % len(COLOURS)])
                axes.bar_label(bars, fmt="%.1f", fontsize=7)
            axes.set_xticks(at + width * (len(models) - 1) / 2, [c.replace("_", " ") for c in conditions])
            axes.set_ylabel(f"{metric} (%)")
            axes.set_title(place, loc="left")
            axes.spines[["top", "right"]].set_visible(False)
            axes.legend(frameon=False, ncols=len(models), loc="upper right", bbox_to_anchor=(1, 1.15))


def draw_levels(grid: Grid, levels: Sequence[float], metric: str, path: Path) -> None:
    """A line per model over the covered share, one panel per place."""
    with saved_figure(path, (4.5 * len(grid), 3.6)) as figure:
        for axes, (place, conditions) in zip(
            figure.subplots(1, len(grid), squeeze=False).flat, grid.items(), strict=True
        ):
            for i, model in enumerate(next(iter(conditions.values()))):
                scores = [values[model] for values in conditions.values()]
                axes.plot(levels, scores, marker="o", label=model, color=COLOURS[i % len(COLOURS)])
                for level, score in zip(levels, scores, strict=True):
                    axes.annotate(
                        f"{score:.1f}", (level, score), (4, 5 - 14 * (i % 2)), textcoords="offset points", fontsize=8
                    )
            axes.set_xlabel("share of the image covered (%)")
            axes.set_xticks(levels)
            axes.margins(x=0.12, y=0.15)
            axes.set_ylabel(f"{metric} (%)")
            axes.set_title(place, loc="left")
            axes.spines[["top", "right"]].set_visible(False)
            axes.legend(frameon=False)
