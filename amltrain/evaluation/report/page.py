"""Render a report: one HTML file without outside references."""

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from amltrain import __version__
from amltrain.errors import UserError
from amltrain.evaluation.report.collect import Card
from amltrain.evaluation.report.curves import Chart
from amltrain.evaluation.results import Results
from amltrain.evaluation.tables import describe, split_label

GROUPS = ("chosen", "best", "worst", "random")


class SplitPart(NamedTuple):
    """Content of the page for one split: its scores, charts over all samples, and the predictions shown."""

    results: Results
    charts: Sequence[Chart]
    cards: Sequence[Card]


def render(
    title: str, facts: Mapping[str, str], curves: Sequence[Chart], splits: Sequence[SplitPart], tau: float | None = None
) -> str:
    """Return the page. facts: name -> text, shown at its top; tau: AML's threshold, None without masks."""
    environment = Environment(
        loader=PackageLoader("amltrain.evaluation.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    cards = [card for split in splits for card in split.cards]
    return environment.get_template("report.html.j2").render(
        title=title,
        version=__version__,
        facts=facts,
        curves=[(c.title, Markup(c.svg)) for c in curves],
        splits=[_split(split) for split in splits],
        tables=_tables([split.results for split in splits]),
        cards=cards,
        groups=[g for g in GROUPS if any(c.group == g for c in cards)],
        datasets=sorted({c.dataset for c in cards}),
        split_names=sorted({c.split for c in cards}),
        longest=max((c.words for c in cards), default=1),
        has_scores=any(c.layers.scores for c in cards),
        tau=tau,
    )


def check_writable(path: Path) -> None:
    """Raise UserError if a page cannot be written here; called before minutes of scoring."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.touch()
        temporary.unlink()
        if path.is_dir():
            raise IsADirectoryError(None, "it is a folder")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}; choose another --output") from error


def write_page(path: Path, page: str) -> None:
    """Write the page atomically. Raises UserError when it cannot be written."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(page, encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}; choose another --output") from error
    finally:
        temporary.unlink(missing_ok=True)


def _split(split: SplitPart) -> dict[str, Any]:
    results = split.results
    return {
        "name": f"{results.dataset} {results.split}",
        "protocol": describe(results),
        "samples": results.counts["samples"],
        "scored": results.alteration or f"all {results.counts['samples']} samples",
        "shown": len(split.cards),
        "charts": [(c.title, Markup(c.svg)) for c in split.charts],
    }


def _tables(results: Sequence[Results]) -> list[dict[str, Any]]:
    """Return a table for each kind of metrics: its columns, and its rows."""
    groups: dict[tuple[str, ...], list[Results]] = {}
    for result in results:
        groups.setdefault(tuple(result.metrics), []).append(result)
    return [
        {"columns": names, "rows": [(r.dataset, split_label(r), r.counts["samples"], _cells(r)) for r in group]}
        for names, group in groups.items()
    ]


def _cells(results: Results) -> list[str]:
    return ["–" if math.isnan(value) else f"{value:.2f}" for value in results.metrics.values()]
