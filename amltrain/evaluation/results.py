"""Scores that carry their protocol with them, so that nobody has to ask which IoU a number is."""

import json
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from amltrain import __version__
from amltrain.errors import UserError

SAMPLE_COLUMNS = ("sample_id", "intersection", "union", "no_target", "predicted_no_target", "finite")
SAME_FORM = {"oIoU": "cIoU", "mIoU": "gIoU", "cIoU": "oIoU", "gIoU": "mIoU"}
"""Classic and generalized metrics of one form: cumulative (oIoU, cIoU) and mean (mIoU, gIoU)."""


class Prediction(NamedTuple):
    """One sample kept for a picture; masks at the image's own size, [h0, w0] bool."""

    sample_id: int
    mask: NDArray[np.bool_]
    truth: NDArray[np.bool_]
    predicted_no_target: bool


@dataclass(frozen=True)
class Results:
    """Scores of one split.

    metrics      percent; classic (oIoU, mIoU, Pr@0.5-0.9) or generalized (gIoU, cIoU, N-acc, T-acc, Pr@0.7-0.9)
    counts       samples, referents, images, no_target, empty_unions, not_finite (samples with NaN or Inf logits)
    protocol     everything that decides a score: frame, size, threshold, interpolation, ties, mask parts, ...
    provenance   what was scored and how: checkpoint, seed, precision, perturbation, ...
    samples      [N, 6] int64, one row per sample in the order of sample ids, columns as in `SAMPLE_COLUMNS`
    predictions  samples kept for pictures
    """

    dataset: str
    split: str
    metrics: dict[str, float]
    counts: dict[str, int]
    protocol: dict[str, Any]
    provenance: dict[str, Any] = field(default_factory=dict)
    samples: NDArray[np.int64] = field(default_factory=lambda: np.zeros((0, len(SAMPLE_COLUMNS)), dtype=np.int64))
    predictions: list[Prediction] = field(default_factory=list)

    def score(self, name: str) -> float:
        """A metric in percent; oIoU also finds cIoU and mIoU gIoU (and back), the same form under the other rule.

        Raises UserError for a name that was not computed.
        """
        for key in (name, SAME_FORM.get(name)):
            if key in self.metrics:
                return self.metrics[key]
        raise UserError(f"no metric {name!r} on {self.dataset} {self.split}; known: {', '.join(self.metrics)}")

    def to_dict(self) -> dict[str, Any]:
        """What results.json keeps; NaN (a ratio over nothing) becomes null."""
        return {
            "dataset": self.dataset,
            "split": self.split,
            "metrics_percent": {k: None if math.isnan(v) else round(v, 4) for k, v in self.metrics.items()},
            "counts": self.counts,
            "protocol": self.protocol,
            "provenance": self.provenance,
        }


def write_results(path: str | Path, results: Sequence[Results]) -> None:
    """Write results.json: written aside and renamed, so that a reader never finds half of it."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"amltrain": __version__, "results": [r.to_dict() for r in results]}, indent=2)
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        aside.write_text(text + "\n", encoding="utf-8")
        aside.replace(path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from error
    finally:
        aside.unlink(missing_ok=True)


def read_results(path: str | Path) -> list[Results]:
    """What `write_results` wrote, without samples and predictions. Raises UserError for any other file."""
    try:
        entries = json.loads(Path(path).read_text(encoding="utf-8"))["results"]
        return [_from_dict(entry) for entry in entries]
    except FileNotFoundError as error:
        raise UserError(f"there is no {path}") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is no results.json of amltrain ({type(error).__name__}: {error})") from error


def _from_dict(entry: dict[str, Any]) -> Results:
    metrics = {k: math.nan if v is None else float(v) for k, v in entry["metrics_percent"].items()}
    named = {name: entry[name] for name in ("dataset", "split", "counts", "protocol", "provenance")}
    return Results(metrics=metrics, **named)


def _cell(value: float | None) -> str:
    return "-" if value is None or math.isnan(value) else f"{value:.2f}"


def table(results: Sequence[Results]) -> str:
    """The scores as markdown (readable as plain text): one table per kind of metric, one row per split, then protocols.

    Percent with two decimals, as in the papers.
    """
    groups: dict[tuple[str, ...], list[Results]] = {}
    for result in results:
        groups.setdefault(tuple(result.metrics), []).append(result)
    lines: list[str] = []
    for names, group in groups.items():
        rows = [("dataset", "split", "samples", *names)]
        rows += [(r.dataset, _label(r), str(r.counts["samples"]), *(_cell(r.metrics[n]) for n in names)) for r in group]
        lines += [*_markdown(rows + _means(group, names)), ""]
    lines += dict.fromkeys(f"Scored {describe(r)}." for r in results)
    for r in results:
        name, count = f"{r.dataset} {_label(r)}", r.counts
        if count.get("empty_unions"):
            lines.append(f"{name}: {count['empty_unions']} samples with an empty union count as IoU 0.")
        if count.get("not_finite"):
            lines.append(f"{name}: the logits of {count['not_finite']} samples are NaN or infinite!")
        lines += [f"{name}: {seen}" for seen in _seen_in_training(r)]
    return "\n".join(lines)


def _seen_in_training(result: Results) -> Iterator[str]:
    """What a reader must know of scores on data that the model may have learnt."""
    trained_on = result.provenance.get("trained_on") or []
    if result.dataset in trained_on and result.split == result.provenance.get("train_split"):
        yield "the model was trained on this split."
    elif len(trained_on) > 1 and not result.provenance.get("leak_filter", True):
        yield f"trained on {', '.join(trained_on)} without the leak filter: images of this split may be among them."


def _label(result: Results) -> str:
    """The split, and what was done to it."""
    notes = []
    if changed := result.provenance.get("perturbation"):
        notes.append(f"{changed['name']} {changed['severity']:g}")
    if result.protocol.get("shuffled_sentences"):
        notes.append("sentences shuffled")
    return f"{result.split} ({', '.join(notes)})" if notes else result.split


def _means(group: Sequence[Results], names: Sequence[str]) -> list[tuple[str, ...]]:
    """A row for every split that was scored under several perturbations: the plain mean of their scores."""
    splits: dict[tuple[str, str], list[Results]] = {}
    for result in group:
        if result.provenance.get("perturbation"):
            splits.setdefault((result.dataset, result.split), []).append(result)
    return [
        (name, f"{split} (mean of {len(rs)})", "", *(_cell(sum(r.metrics[n] for r in rs) / len(rs)) for n in names))
        for (name, split), rs in splits.items()
        if len(rs) > 1
    ]


def _markdown(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    pad = [str.ljust, str.ljust, *[str.rjust] * (len(widths) - 2)]
    lines = ["| " + " | ".join(p(c, w) for p, c, w in zip(pad, row, widths, strict=True)) + " |" for row in rows]
    rule = ["-" * w if i < 2 else "-" * (w - 1) + ":" for i, w in enumerate(widths)]
    return [lines[0], "| " + " | ".join(rule) + " |", *lines[1:]]


def describe(result: Results) -> str:
    """The protocol in one phrase: "at the original size, probability > 0.35 (bicubic), all sentences, ..."."""
    p = result.protocol
    frame = "the original size" if p["frame"] == "original" else f"{p['size'][0]} x {p['size'][1]}"
    ties = "IoU >= t" if p["ties"] == "ge" else "I / (U + 1e-6) > t"
    text = (
        f"at {frame}, probability > {p['threshold']} ({p['interpolation']}), {p['sentences']} sentences, Pr@t: {ties}"
    )
    if p.get("mask_parts") == "exclusive":
        text += ", overlapping parts of an object are background"
    if p["metrics"] == "generalized":
        text += f", no target by {p['no_target_by']}"
    return text
