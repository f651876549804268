"""Charts as SVG text that takes its colours from the page, so that they fit light and dark."""

import html
import io
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from numpy.typing import NDArray

INK, GRID = "#010203", "#010204"
SERIES = ("#010205", "#010206", "#010207", "#010208", "#010209", "#01020a")
VARIABLES = {INK: "ink", GRID: "grid"} | {colour: f"series-{i}" for i, colour in enumerate(SERIES)}
"""Colours that stand for CSS variables of the page."""
SIZE = (6.0, 3.1)


class Chart(NamedTuple):
    """title: plain text; svg: markup without outside references."""

    title: str
    svg: str


Row = Mapping[str, float]


def numbers(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, float]]:
    """Keep the numbers of every row of a log."""
    return [{k: float(v) for k, v in row.items() if isinstance(v, (int, float))} for row in rows]


def training_charts(rows: Sequence[Row]) -> list[Chart]:
    """Draw the training loss, the validation scores, and the method's values; charts without a value are left out."""
    names = {name for row in rows for name in row}
    scores = sorted(n for n in names if "/" in n and not n.startswith("alignment/"))
    by_split: dict[str, list[str]] = {}
    for name in scores:
        by_split.setdefault(name.rpartition("/")[0], []).append(name)
    charts = [
        lines("Training loss", rows, [n for n in ("loss", "clean_loss", "masked_loss") if n in names]),
        *(lines(f"Scores on {split}, percent", rows, _main_scores(own)) for split, own in by_split.items()),
        lines("Learning rate factor", rows, ["lr_factor"]),
        lines("Gradient norm", rows, ["grad_norm"]),
        lines("Share of blocks masked, mean alignment score", rows, ["masked_share", "mean_score"]),
        lines("Share of patches below a score", rows, sorted(n for n in names if n.startswith("alignment/below"))),
    ]
    return [chart for chart in charts if chart is not None]


def _main_scores(names: Sequence[str]) -> list[str]:
    wanted = ("oIoU", "mIoU", "gIoU", "cIoU", "Pr@0.5", "Pr@0.7", "Pr@0.9", "N-acc", "T-acc")
    return [n for w in wanted for n in names if n.rpartition("/")[2] == w][: len(SERIES)]


def lines(title: str, rows: Sequence[Row], names: Sequence[str]) -> Chart | None:
    """Draw series over steps; None when no row has any of them."""
    series = [(n, [(r["step"], r[n]) for r in rows if n in r and math.isfinite(r[n])]) for n in names]
    series = [(name, points) for name, points in series if points]
    if not series:
        return None
    if all(len(points) == 1 for _, points in series):
        return _bars(title, [(name, points[0]) for name, points in series])
    figure, axes = _figure()
    for (name, points), colour in zip(series, SERIES, strict=False):
        x, y = zip(*points, strict=True)
        label, marker = name.rpartition("/")[2].replace("_", " "), "o" if len(x) < 25 else None
        axes.plot(x, y, color=colour, linewidth=1.6, label=label, marker=marker, markersize=3)
    axes.set_xlabel("step")
    axes.set_xlim(left=0)  # one evaluation alone would get an axis around itself
    if len(series) > 1:
        axes.legend(frameon=False, fontsize=8, labelcolor=INK, ncols=min(3, len(series)))
    return Chart(title, _svg(figure, f"{title}, by step"))


def _bars(title: str, series: Sequence[tuple[str, tuple[float, float]]]) -> Chart:
    """Draw a labelled bar for each (name, (step, value)): of one evaluation a line would be a dot."""
    figure, axes = _figure()
    names = [name.rpartition("/")[2].replace("_", " ") for name, _ in series]
    bars = axes.bar(range(len(series)), [value for _, (_, value) in series], color=SERIES[: len(series)], width=0.6)
    axes.bar_label(bars, fmt="%.4g", fontsize=9, color=INK, padding=2)
    axes.set_xticks(range(len(series)), names)
    axes.set_xlim(-0.8, max(len(series) - 0.2, 2.8))  # a bar alone is not as wide as the chart
    axes.margins(y=0.12)
    steps = dict.fromkeys(f"{step:,.0f}" for _, (step, _) in series)
    axes.set_xlabel(f"step {', '.join(steps)}")
    return Chart(title, _svg(figure, f"{title}, by step"))


def histogram(title: str, iou: NDArray[np.float64]) -> Chart:
    """Draw the distribution of IoU, values in 0..1."""
    figure, axes = _figure()
    axes.hist(iou * 100, bins=np.arange(0, 101, 5), color=SERIES[0])
    axes.set_xlabel("IoU, percent")
    axes.set_ylabel("samples")
    return Chart(title, _svg(figure, title))


def by_length(title: str, iou: NDArray[np.float64], words: NDArray[np.int64]) -> Chart:
    """Draw the mean IoU by number of words, with its standard error; lengths above 12 are joined."""
    figure, axes = _figure()
    lengths = np.minimum(words, 12)
    values = np.unique(lengths)
    groups = [iou[lengths == n] * 100 for n in values]
    errors = [g.std(ddof=1) / math.sqrt(len(g)) if len(g) > 1 else 0 for g in groups]
    axes.bar(range(len(values)), [g.mean() for g in groups], yerr=errors, color=SERIES[1], ecolor=INK, width=0.7)
    labels = [f"{n}{'+' if n == 12 else ''}\n({len(g)})" for n, g in zip(values, groups, strict=True)]
    axes.set_xticks(range(len(values)), labels)
    axes.set_xlabel("words in the sentence (samples)")
    axes.set_ylabel("mean IoU, percent")
    return Chart(title, _svg(figure, title))


def _figure() -> tuple[Figure, Any]:
    figure = Figure(figsize=SIZE, layout="constrained")
    FigureCanvasSVG(figure)
    figure.patch.set_alpha(0)
    axes = figure.add_subplot()
    axes.patch.set_alpha(0)
    axes.grid(color=GRID, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(colors=INK, labelsize=8)
    for part in (axes.xaxis.label, axes.yaxis.label):
        part.set_color(INK)
        part.set_fontsize(9)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(INK)
    return figure, axes


def _svg(figure: Figure, label: str) -> str:
    """The figure's <svg> element, with colours replaced by CSS variables and text kept as text."""
    out = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": label}):
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = out.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', rf'\1 role="img" aria-label="{html.escape(label)}"', text, count=1)
    for colour, name in VARIABLES.items():
        text = text.replace(colour, f"var(--{name})")
    return text
