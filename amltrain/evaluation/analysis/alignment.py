"""Tables and pictures of alignment scores: several models (Fig. 6), the checkpoints of a run (Tables 12, 13)."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from amltrain.evaluation.analysis.figures import COLOURS, saved_figure
from amltrain.evaluation.tables import markdown

PANELS = (
    ("alignment scores", ("score_mean", "score_std", "above_0.5", "above_0.9")),
    ("share of the referents' area in patches below", tuple(f"referent_below_{tau}" for tau in (0.2, 0.3, 0.4, 0.6))),
)


def histogram_table(shares: Mapping[str, NDArray[np.float64]], statistics: Mapping[str, Mapping[str, float]]) -> str:
    """Percent of the patches in every bin, one column per model, and statistics below."""
    bins = len(next(iter(shares.values())))
    rows = [
        (f"{i / bins:.2f} to {(i + 1) / bins:.2f}", *(f"{100 * values[i]:.2f}" for values in shares.values()))
        for i in range(bins)
    ]
    return "\n".join(
        [*markdown([("score", *shares), *rows], text_columns=1), "", statistics_table(statistics, "model")]
    )


def statistics_table(statistics: Mapping[str, Mapping[str, float]], what: str) -> str:
    """Return a table: one row per model or checkpoint, one column per statistic."""
    names = list(next(iter(statistics.values())))
    rows = [(row, *(f"{values[name]:.4f}" for name in names)) for row, values in statistics.items()]
    return "\n".join(markdown([(what, *(n.replace("_", " ") for n in names)), *rows], text_columns=1))


def draw_histogram(shares: Mapping[str, NDArray[np.float64]], path: Path) -> None:
    """Both distributions as steps over 0..1."""
    with saved_figure(path, (6, 4)) as figure:
        axes = figure.subplots()
        for i, (model, values) in enumerate(shares.items()):
            edges = np.linspace(0, 1, len(values) + 1)
            axes.stairs(100 * values, edges, fill=True, alpha=0.3, color=COLOURS[i % len(COLOURS)], label=model)
            axes.stairs(100 * values, edges, color=COLOURS[i % len(COLOURS)])
        axes.set_xlabel("alignment score")
        axes.set_ylabel("patches (%)")
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)


def draw_dynamics(steps: Sequence[int], statistics: Sequence[Mapping[str, float]], path: Path) -> None:
    """Statistics over the steps of a run, two panels."""
    with saved_figure(path, (10, 3.8)) as figure:
        for axes, (title, names) in zip(figure.subplots(1, len(PANELS)), PANELS, strict=True):
            for i, name in enumerate(names):
                values = [s[name] for s in statistics]
                axes.plot(steps, values, marker="o", label=name.replace("_", " "), color=COLOURS[i % len(COLOURS)])
            axes.set_title(title, loc="left", fontsize=10)
            axes.set_xlabel("step")
            axes.set_ylim(bottom=0)
            axes.spines[["top", "right"]].set_visible(False)
            axes.legend(frameon=False, fontsize="small")
