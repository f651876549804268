"""Error analysis: scores by length and kind of the expression, object size, distractors and category; worst cases.

Reads the samples that `amltrain evaluate` writes. Words are looked up in English lists; a sentence may be of several
kinds, so the rows of `kind` overlap.
"""

import re
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from amltrain.evaluation.metrics import Kind, Scored, Ties, compute_scores, metric_terms, take
from amltrain.evaluation.samples import scored_samples
from amltrain.evaluation.tables import cell, markdown
from amltrain.paper.figures import COLOURS, saved_figure

Mask = NDArray[np.bool_]

WORDS: dict[str, str] = {
    "position": "left|right|top|bottom|upper|lower|middle|center|centre|front|back|corner|far|near|nearest|closest|"
    "background|foreground|above|below|under|leftmost|rightmost|lft|rt|edge|side",
    "colour": "red|green|blue|yellow|orange|purple|pink|black|white|grey|gray|brown|beige|tan|gold|golden|silver|"
    "blond|blonde|dark|light|striped|plaid|colorful|colou?red",
    "relation": "next to|beside|behind|in front of|on top of|between|holding|wearing|with|riding|near|under|above|"
    "below|beneath|inside|facing|touching|against|looking at|closest to|by",
    "ordinal": "first|second|third|fourth|fifth|sixth|last|1st|2nd|3rd|4th|5th|6th",
    "negation": "not|no|without|isn'?t|aren'?t|doesn'?t|don'?t|nothing|none|neither|never|except",
}
"""Words of every kind, as alternatives of a regular expression on whole words."""

KINDS = {name: re.compile(rf"\b(?:{words})\b", re.IGNORECASE) for name, words in WORDS.items()}
LENGTHS = ((1, 2), (3, 4), (5, 7), (8, 10), (11, None))
"""Words per expression, first and last."""
SIZES = ((0.0, 0.01), (0.01, 0.05), (0.05, 0.15), (0.15, 0.3), (0.3, 1.01))
"""Share of the frame that the ground truth covers."""


class Group(NamedTuple):
    """A group of samples. metrics: percent, by name."""

    name: str
    samples: int
    metrics: dict[str, float]


def kinds_of(sentence: str) -> set[str]:
    """Kinds of an expression; "plain" alone where no listed word occurs."""
    return {name for name, pattern in KINDS.items() if pattern.search(sentence)} or {"plain"}


def break_down(samples: pa.Table, ties: Ties, kind: Kind, names: Collection[str] = ()) -> dict[str, list[Group]]:
    """Scores by aspect: length, kind, size, distractors and category (each where the samples know it), groups in order.

    samples: as `read_samples` gives them. ties, kind: of the results' protocol. names: metrics; empty = those that
    every data set has.
    """
    scored = scored_samples(samples, ties)
    sentences = samples.column("sentence").to_pylist()
    words = np.array([len(s.split()) for s in sentences])
    found = [kinds_of(s) for s in sentences]
    share, others = (samples.column(name).to_numpy() for name in ("truth_share", "same_class"))
    categories = np.array(samples.column("category").to_pylist())

    def groups(named: Iterator[tuple[str, Mask]]) -> list[Group]:
        return [Group(n, int(m.sum()), _metrics(take(scored, m), kind, names)) for n, m in named if m.any()]

    named = [c for c in sorted(set(categories)) if c]
    return {
        "words": groups((f"{a} to {b}" if b else f"{a} or more", _between(words, a, b)) for a, b in LENGTHS),
        "kind": groups((k, np.array([k in f for f in found])) for k in (*KINDS, "plain")),
        "object size": groups((_percent(a, b), (share >= a) & (share < b)) for a, b in SIZES),
        "same-class objects": groups((_count(n), others == n if n < 3 else others >= 3) for n in range(4)),
        "category": sorted(groups((c, categories == c) for c in named), key=lambda g: -g.samples),
    }


def _metrics(samples: Scored, kind: Kind, names: Collection[str]) -> dict[str, float]:
    if not names:
        return compute_scores(samples, kind)
    return {name: metric_terms(name, samples, kind).percent() for name in names}


def _between(values: NDArray[Any], low: int, high: int | None) -> Mask:
    return (values >= low) & (values <= (high or np.inf))


def _percent(low: float, high: float) -> str:
    return f"{100 * low:g} % or more" if high > 1 else f"{100 * low:g} to {100 * high:g} %"


def _count(number: int) -> str:
    return str(number) if number < 3 else "3 or more"


def worst_cases(samples: pa.Table, count: int) -> list[dict[str, Any]]:
    """The samples of lowest IoU, ties broken by the larger object; each referent at most once."""
    order = np.lexsort((-samples.column("truth_area").to_numpy(), samples.column("iou").to_numpy()))
    cases: list[dict[str, Any]] = []
    seen: set[int] = set()
    for row in order.tolist():
        case = samples.slice(row, 1).to_pylist()[0]
        if case["ref_id"] not in seen:
            seen.add(case["ref_id"])
            cases.append(case)
        if len(cases) == count:
            break
    return cases


def breakdown_markdown(groups: dict[str, list[Group]], worst: Sequence[dict[str, Any]]) -> str:
    """Return a table per aspect, and the worst cases."""
    lines: list[str] = []
    for aspect, found in groups.items():
        if not found:
            lines += [f"No {aspect}: the prepared data do not name the category of the objects.", ""]
            continue
        names = list(found[0].metrics)
        rows = [(g.name, str(g.samples), *(cell(g.metrics[n]) for n in names)) for g in found]
        lines += [*markdown([(aspect, "samples", *names), *rows], text_columns=1), ""]
    lines.append("Kinds overlap. Same-class objects: those in the image that this split refers to, a lower bound.")
    if worst:
        ids = ("sample_id", "image_id", "ref_id")
        rows = [(c["sentence"], *(str(c[name]) for name in ids), cell(100 * c["iou"])) for c in worst]
        lines += ["", *markdown([("worst", *ids, "IoU"), *rows], text_columns=1), ""]
        lines.append("To see them: amltrain analyse pictures --samples SAMPLE_ID ..., or amltrain report --samples.")
    return "\n".join(lines)


def draw_breakdown(groups: dict[str, list[Group]], path: Path, shown: int = 12) -> None:
    """Mean IoU (without one, the first metric) of every group as bars with the number of samples, one panel per aspect.

    shown: bars per panel at most; of categories those with the most samples.
    """
    panels = {aspect: found[:shown] for aspect, found in groups.items() if found}
    with saved_figure(path, (8, 0.6 * len(panels) + 0.28 * sum(map(len, panels.values())))) as figure:
        heights = [len(found) + 2 for found in panels.values()]
        grid = figure.subplots(len(panels), 1, squeeze=False, height_ratios=heights).flat
        for axes, (aspect, found) in zip(grid, panels.items(), strict=True):
            metric = next((n for n in ("mIoU", "gIoU") if n in found[0].metrics), next(iter(found[0].metrics)))
            names = [f"{group.name}  (n = {group.samples})" for group in found]
            bars = axes.barh(names, [group.metrics[metric] for group in found], color=COLOURS[0])
            axes.bar_label(bars, fmt="%.1f", fontsize=8, padding=2)
            axes.set_xlim(0, 105)
            axes.invert_yaxis()
            axes.set_title(f"{aspect}: {metric} (%)", loc="left", fontsize=10)
            axes.spines[["top", "right"]].set_visible(False)
