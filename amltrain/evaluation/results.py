"""How each official repository scores its test split, by name (`--preset`), as its models in the registry declare it.

They differ in these options only; the formulas are in `metrics`, the way from logits to a mask in `masks`.

Scores that carry their protocol, and the file that keeps them: results.json.

A results.json holds one row per model, data set, split, protocol, perturbation, shuffling and number of samples. A new
row replaces the row with the same key; all others are kept.
"""

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from amltrain import __version__
from amltrain.config.fields import check_number, override
from amltrain.config.schema import DataConfig, Preprocess, Protocol, ProtocolOverrides
from amltrain.errors import UserError, plain, unknown_name
from amltrain.evaluation.metrics import Kind, Scored
from amltrain.files import locked, new_file
from amltrain.models import model_info
from amltrain.registry import MODELS


def presets() -> list[str]:
    """Names of the evaluation presets: the families of models, each of which is scored as its official code does."""
    return sorted(MODELS.families())


def named_protocol(name: str) -> Protocol:
    """The protocol of a family's official code. Raises UserError for an unknown name."""
    return model_info(_family(name)[0]).protocol


def named_preprocess(name: str) -> Preprocess:
    """The preprocessing of a family's full-size model. Raises UserError for an unknown name."""
    return max((model_info(model).preprocess for model in _family(name)), key=lambda preprocess: preprocess.size)


def _family(name: str) -> list[str]:
    families = MODELS.families()
    if name not in families:
        raise unknown_name("evaluation preset", name, families)
    return families[name]


def run_protocol(own: Protocol, data: DataConfig, run: ProtocolOverrides) -> Protocol:
    """Take the model's or a preset's protocol, then data.mask_parts, then what the run sets; the last one wins.

    Raises UserError for a threshold that decides nothing.
    """
    protocol = override(override(own, ProtocolOverrides(mask_parts=data.mask_parts)), run)
    check_number("evaluation.protocol.threshold", protocol.threshold, 0, 1)
    if protocol.threshold in (0, 1):
        raise UserError(f"evaluation.protocol.threshold={protocol.threshold} must lie between 0 and 1, both excluded")
    return protocol


BOX_COLUMNS = ("box_intersection", "box_union")
"""Pixels of the boxes around prediction and truth."""
DETECTED_COLUMNS = ("detected_intersection", "detected_union")
"""Areas of the model's own box against the true one, in 1/4096 of an original pixel; 0 for a model without boxes."""
SAMPLE_COLUMNS = (
    "sample_id",
    "intersection",
    "union",
    "no_target",
    "predicted_no_target",
    "finite",
    "area",
    *BOX_COLUMNS,
    *DETECTED_COLUMNS,
)
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

    metrics      percent; classic (oIoU, mIoU, Pr@0.5-0.9) or generalized (gIoU, cIoU, N-acc, T-acc, Pr@0.7-0.9, and
                 those of the data set's papers)
    counts       samples, referents, images, no_target, empty_unions, empty_masks (predictions without a pixel),
                 not_finite (samples with NaN or Inf logits)
    protocol     everything that decides a score: frame, size, threshold, interpolation, ties, mask parts, ...
    provenance   subject and settings of the evaluation: checkpoint, seed, precision, perturbation, ...
    files        other files of the evaluation, by kind: samples, picture, predictions; relative paths
    samples      [N, 11] int64, one row per sample in the order of sample ids, columns as in `SAMPLE_COLUMNS`
    predictions  samples kept for pictures
    """

    dataset: str
    split: str
    metrics: dict[str, float]
    counts: dict[str, int]
    protocol: dict[str, Any]
    provenance: dict[str, Any] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)
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

    @property
    def kind(self) -> Kind:
        """The set of metrics: "classic" or "generalized"."""
        return "generalized" if self.protocol.get("metrics") == "generalized" else "classic"

    @property
    def alteration(self) -> str:
        """What distinguishes this row from a score of the data set, e.g. "haze 1"; empty for a score."""
        notes = []
        if changed := self.provenance.get("perturbation"):
            share = f"{100 * changed['severity']:g} %" if changed["name"] == "occluded" else f"{changed['severity']:g}"
            notes.append(f"{changed['name']} {share}")
        if self.protocol.get("shuffled_sentences"):
            notes.append("sentences shuffled")
        if self.provenance.get("max_samples"):
            notes.append(f"first {self.provenance['max_samples']} samples")
        return ", ".join(notes)

    @property
    def is_score(self) -> bool:
        """The whole split was scored as it is: neither perturbed nor shuffled images or sentences, no subset.

        Only such rows may be published or compared as scores.
        """
        return not self.alteration

    def key(self) -> str:
        """Return the key by which rows of results.json are merged, as JSON text."""
        names = ("checkpoint", "predictions", "model", "step", "perturbation", "max_samples")
        source = {name: self.provenance.get(name) for name in names}
        if source["checkpoint"] is not None or source["predictions"] is not None:
            source["step"] = None  # scored again after `best` has moved, a split has one row, the new one
        return json.dumps([self.dataset, self.split, self.protocol, source], sort_keys=True)

    def stem(self) -> str:
        """A file name for what belongs to this row, e.g. `refcoco-val-haze-1-3fa2c1`; no two keys share one.

        The last six characters are a hash of the key.
        """
        changed = self.alteration.replace(", ", "-").replace(" %", "").replace(" ", "-")
        digest = hashlib.sha256(self.key().encode()).hexdigest()[:6]
        return "-".join(part for part in (self.dataset, self.split, changed, digest) if part)

    def sample_iou(self) -> NDArray[np.float64]:
        """IoU of every sample in 0..1, [N], with the no-target rule where the generalized metrics are computed."""
        scored = self.scored()
        return scored.ruled.iou if self.kind == "generalized" else scored.iou

    def scored(self) -> Scored:
        """The samples as columns for metrics; the generalized rules know only the arithmetic "ge"."""
        columns = dict(zip(SAMPLE_COLUMNS, self.samples.T, strict=True))
        return Scored(
            columns["intersection"],
            columns["union"],
            columns["area"],
            columns["no_target"].astype(bool),
            columns["predicted_no_target"].astype(bool),
            self.protocol["ties"],
            None,
            *(columns[name] for name in (*BOX_COLUMNS, *DETECTED_COLUMNS)),
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the values for results.json; NaN (a ratio over nothing) becomes null."""
        return {
            "dataset": self.dataset,
            "split": self.split,
            "metrics_percent": {k: None if math.isnan(v) else round(v, 4) for k, v in self.metrics.items()},
            "counts": self.counts,
            "protocol": self.protocol,
            "provenance": self.provenance,
            **({"files": self.files} if self.files else {}),
        }


def results_json(results: Sequence[Results]) -> str:
    """The text of a results.json."""
    return json.dumps({"amltrain": __version__, "results": [r.to_dict() for r in results]}, indent=2) + "\n"


def write_results(path: str | Path, results: Sequence[Results]) -> None:
    """Write results.json atomically, with these rows alone. Raises UserError when it cannot be written."""
    write_text(path, results_json(results))


def merge_results(
    path: str | Path,
    results: Sequence[Results],
    *,
    also: Callable[[Path, Sequence[Results]], None] | None = None,
) -> list[Results]:
    """Add rows to a results.json and return all of its rows: those already there first, in their order.

    A row with the key of a new one (`Results.key`) is replaced in its place; no other row is changed or lost, also when
    several commands write to the file at once. also: writes what belongs to the rows (tables) into the file's folder,
    before another command can. Raises UserError, and leaves the file alone, when it is damaged.
    """
    path = Path(path)
    with locked(path, "choose another --output"):
        merged = {r.key(): r for r in (read_results(path) if path.exists() else [])}
        merged |= {r.key(): r for r in results}
        rows = list(merged.values())
        write_results(path, rows)
        if also is not None:
            also(path.parent, rows)
    return rows


def moved_models(rows: Sequence[Results]) -> list[str]:
    """One sentence for every checkpoint whose rows are scores of different weights: `best` has moved between them."""
    found: dict[str, dict[str, list[Results]]] = {}
    for row in rows:
        name, weights = row.provenance.get("checkpoint"), row.provenance.get("weights_sha256")
        if isinstance(name, str) and isinstance(weights, str):
            found.setdefault(name, {}).setdefault(weights, []).append(row)
    lines = []
    for name, models in found.items():
        if len(models) > 1:
            parts = []
            for weights, scored in models.items():
                splits = ", ".join(dict.fromkeys(f"{row.dataset} {row.split}" for row in scored))
                step = scored[0].provenance.get("step")
                parts.append(f"{splits} by {weights[:8]}" + ("" if step is None else f" (step {step})"))
            lines.append(
                f"{plain(name)} is not one model in these results: {'; '.join(parts)}. Score every split again."
            )
    return lines


def write_text(path: str | Path, text: str) -> None:
    """Write a text file atomically, into a folder that is made. Raises UserError when that fails."""
    with new_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def read_results(path: str | Path) -> list[Results]:
    """Read what `write_results` wrote, without samples and predictions. Raises UserError for any other file."""
    try:
        if Path(path).exists() and not Path(path).is_file():  # a named pipe would be waited for
            raise UserError(f"{path} is not a regular file")
        entries = json.loads(Path(path).read_text(encoding="utf-8"))["results"]
        return [_from_dict(entry) for entry in entries]
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist") from error
    except UserError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise UserError(f"{path} is not a results.json of amltrain ({type(error).__name__}: {error})") from error


def _from_dict(entry: dict[str, Any]) -> Results:
    metrics = {k: math.nan if v is None else float(v) for k, v in entry["metrics_percent"].items()}
    named = {name: entry[name] for name in ("dataset", "split", "counts", "protocol", "provenance")}
    for name, value in {**named, "files": entry.get("files", {})}.items():
        wanted = str if name in ("dataset", "split") else dict
        if not isinstance(value, wanted):
            raise TypeError(f"{name} is no {'text' if wanted is str else 'object'}")
    if not all(isinstance(count, int) for count in named["counts"].values()) or "samples" not in named["counts"]:
        raise TypeError("its counts have no samples, or are not numbers")
    return Results(metrics=metrics, files=entry.get("files", {}), **named)
