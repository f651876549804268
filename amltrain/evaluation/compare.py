"""Compare models over seeds: means, deviations, and differences with intervals over images and seeds.

Sentences of one image are not independent, so the bootstrap draws images with replacement and takes all their samples,
and draws seeds on top (`statistics.two_way`). The same draw serves both models, which are paired by place where they
have as many seeds. Metrics are ratios of sums, so a draw costs one product of matrices. Everything is a function of the
seed.
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from amltrain.errors import UserError
from amltrain.evaluation.metrics import METRICS, Kind, metric_terms
from amltrain.evaluation.results import Results, moved_models, read_results
from amltrain.evaluation.samples import check_origin, read_samples, scored_samples
from amltrain.evaluation.statistics import (
    PairedTest,
    holm,
    image_draws,
    least_p,
    paired_t,
    sign_flip,
    two_sided,
    two_way,
)
from amltrain.evaluation.tables import cell, latex, markdown
from amltrain.files import is_sealed
from amltrain.run_folder import BEST, MODEL, RESULTS_FILE

SplitKey = tuple[str, str]
"""(data set, split)."""


class Run(NamedTuple):
    """One row of a results.json. samples: its rows per sample; None where the evaluation wrote none."""

    place: str
    results: Results
    samples: pa.Table | None


class Difference(NamedTuple):
    """`model` minus `reference` in percentage points, with a 95 % interval; NaN without samples.

    covers: what the interval covers. p: two-sided, of the same draws; p_holm: corrected for all rows of the table.
    seeds, flip: paired t-test and sign-flip test over seeds; None without as many of both. unequal: the interval leaves
    out 0, and p_holm is below 0.05.
    """

    reference: str
    model: str
    split: SplitKey
    metric: str
    value: float
    low: float
    high: float
    covers: str = ""
    p: float = math.nan
    p_holm: float = math.nan
    seeds: PairedTest | None = None
    flip: float | None = None

    @property
    def unequal(self) -> bool:
        return (self.low > 0 or self.high < 0) and self.p_holm < 0.05


class Comparison(NamedTuple):
    """values: model -> split -> metric -> one value per seed, percent. kinds: split -> kind of metrics."""

    values: dict[str, dict[SplitKey, dict[str, list[float]]]]
    kinds: dict[SplitKey, Kind]
    differences: list[Difference]
    notes: list[str]

    def __str__(self) -> str:
        """The comparison as a Markdown table."""
        return comparison_markdown(self)


def find_results(place: str | Path) -> Path:
    """The results.json of a file, an evaluation's folder, or a run (run, best or model folder). Raises UserError."""
    place = Path(place)
    if place.is_file():
        return place
    for inner in ("", f"{BEST}/{MODEL}", MODEL):
        if (path := place / inner / RESULTS_FILE).is_file():
            return path
    raise UserError(f"{place} has no results.json; write it with amltrain evaluate --checkpoint RUN --output {place}")


def read_runs(place: str | Path) -> dict[SplitKey, list[Run]]:
    """Every score of a results.json by split; perturbed, shuffled and partial rows are left out."""
    path = find_results(place)
    found: dict[SplitKey, list[Run]] = {}
    rows = read_results(path)
    for line in moved_models([row for row in rows if row.is_score]):
        raise UserError(f"{path}: {line}")
    for row in rows:
        if not row.is_score:
            continue
        samples = row.files.get("samples")
        table = read_samples(path.parent / samples) if samples and (path.parent / samples).exists() else None
        if table is not None:
            check_origin(table, row, path.parent / str(samples))
        found.setdefault((row.dataset, row.split), []).append(Run(str(path), row, table))
    if not found:
        raise UserError(
            f"{path} holds no score of a whole split as it is; evaluate without --max_samples, --perturbations and "
            "--shuffle_sentences"
        )
    return found


def compare(
    groups: Mapping[str, Sequence[str | Path]], *, draws: int = 2000, seed: int = 0, metrics: Sequence[str] = ()
) -> Comparison:
    """Compare groups of evaluations; the first group is the reference of all differences.

    groups: model name -> results of its seeds (run folders, evaluation folders or results.json files).
    draws: bootstrap draws. metrics: names to compare; empty = all. Only splits that every result has are compared.
    Raises UserError, naming the field, where two results of a split were measured under different protocols.
    """
    read = {name: [read_runs(place) for place in places] for name, places in groups.items()}
    everything = [runs for group in read.values() for runs in group]
    splits = [split for split in everything[0] if all(split in runs for runs in everything)]
    if not splits:
        raise UserError("the results have no split in common; evaluate all models on the same splits")
    dropped = sorted({split for runs in everything for split in runs} - set(splits))
    notes = [f"{dataset} {split}: left out, because not every result has it" for dataset, split in dropped]
    chosen = {split: _of_one_protocol(split, read) for split in splits}
    notes += _unchecked(chosen)
    kinds: dict[SplitKey, Kind] = {split: next(iter(chosen[split].values()))[0].results.kind for split in splits}
    values: dict[str, dict[SplitKey, dict[str, list[float]]]] = {
        name: {
            split: {
                metric: [run.results.metrics[metric] for run in chosen[split][name]]
                for metric in chosen[split][name][0].results.metrics
                if not metrics or metric in metrics
            }
            for split in splits
        }
        for name in groups
    }
    differences = []
    reference = next(iter(groups))
    for split in splits:
        for name in list(groups)[1:]:
            found, without = _differences(reference, name, split, chosen[split], draws, seed)
            differences += [d for d in found if not metrics or d.metric in metrics]
            notes += without
    corrected = holm([difference.p for difference in differences])
    differences = [d._replace(p_holm=p) for d, p in zip(differences, corrected, strict=True)]
    return Comparison(values, kinds, differences, notes)


def _unchecked(chosen: Mapping[SplitKey, Mapping[str, Sequence[Run]]]) -> list[str]:
    """A line about samples without a checksum, as earlier versions wrote them."""
    runs = [run for models in chosen.values() for group in models.values() for run in group]
    places = list(dict.fromkeys(run.place for run in runs if run.samples is not None and not is_sealed(run.samples)))
    if not places:
        return []
    more = f" and {len(places) - 1} more" if len(places) > 1 else ""
    return [f"the samples of {places[0]}{more} carry no checksum, so damage would not be seen; evaluate again for one"]


def _of_one_protocol(
    split: SplitKey, read: Mapping[str, Sequence[Mapping[SplitKey, list[Run]]]]
) -> dict[str, list[Run]]:
    """The runs of a split by model, all of one protocol. Raises UserError if there is none, or more than one."""
    candidates = [runs[split] for group in read.values() for runs in group]
    common = set.intersection(*({_protocol(run) for run in runs} for runs in candidates))
    if not common:
        _reject(split, candidates)
    if len(common) > 1:
        raise UserError(
            f"{split[0]} {split[1]}: the results hold scores under several common protocols; keep one per folder "
            "(evaluate with another --output)"
        )
    [protocol] = common
    found = {
        name: [[run for run in runs[split] if _protocol(run) == protocol] for runs in group]
        for name, group in read.items()
    }
    for group in found.values():
        for same in group:
            if len(same) > 1:
                what = f"{len(same)} models' scores of {split[0]} {split[1]}"
                raise UserError(f"{same[0].place} holds {what}; give each model a folder of its own")
    return {name: [same[0] for same in group] for name, group in found.items()}


def _protocol(run: Run) -> str:
    return json.dumps(run.results.protocol, sort_keys=True)


def _reject(split: SplitKey, candidates: Sequence[Sequence[Run]]) -> None:
    first = candidates[0][0]
    for [other, *_] in candidates[1:]:
        mine, theirs = first.results.protocol, other.results.protocol
        unequal = [k for k in sorted(mine.keys() | theirs.keys()) if mine.get(k) != theirs.get(k)]
        if unequal:
            fields = ", ".join(f"{k} ({mine.get(k)} and {theirs.get(k)})" for k in unequal)
            raise UserError(
                f"{split[0]} {split[1]}: the protocols of {first.place} and {other.place} differ in {fields}; "
                "evaluate both with the same --preset"
            )
    raise UserError(f"{split[0]} {split[1]}: no protocol is common to all results; evaluate with the same --preset")


def _differences(
    reference: str, model: str, split: SplitKey, runs: Mapping[str, Sequence[Run]], draws: int, seed: int
) -> tuple[list[Difference], list[str]]:
    one, two = runs[reference], runs[model]
    plain = [
        Difference(reference, model, split, name, _mean(two, name) - _mean(one, name), np.nan, np.nan)._replace(
            seeds=paired_t(_values(one, name), _values(two, name)),
            flip=sign_flip(_values(one, name), _values(two, name)),
        )
        for name in one[0].results.metrics
    ]
    if any(run.samples is None for run in (*one, *two)):
        note = f"{split[0]} {split[1]}: no interval for {model}, because not every result has samples; evaluate again"
        return plain, [note]
    _check_same_samples(split, [*one, *two])
    images = _images(one[0])
    if len(set(images)) < 2:
        note = f"{split[0]} {split[1]}: no interval for {model}, because the split has a single image to draw from"
        return plain, [note]
    weights = image_draws(images, draws, seed)
    found = []
    for difference in plain:
        of_one, of_two = (_drawn(group, difference.metric, weights) for group in (one, two))
        if len(one) == len(two):
            drawn, covers = two_way(of_two - of_one, seed + 1), _covers(len(one))
        else:
            drawn = two_way(of_two, seed + 1) - two_way(of_one, seed + 2)
            covers = f"images, {len(two)} and {len(one)} seeds"
        low, high = np.nanpercentile(drawn, [2.5, 97.5])
        found.append(difference._replace(low=float(low), high=float(high), covers=covers, p=two_sided(drawn)))
    return found, []


def _covers(seeds: int) -> str:
    return "images, one seed" if seeds == 1 else f"images, {seeds} seeds"


def _mean(runs: Sequence[Run], metric: str) -> float:
    return float(np.mean(_values(runs, metric)))


def _values(runs: Sequence[Run], metric: str) -> list[float]:
    return [run.results.metrics[metric] for run in runs]


def _check_same_samples(split: SplitKey, runs: Sequence[Run]) -> None:
    names = ["image_id", "ref_id", "sent_id"]
    for run in runs[1:]:
        assert run.samples is not None and runs[0].samples is not None
        if not run.samples.select(names).equals(runs[0].samples.select(names)):
            raise UserError(
                f"{split[0]} {split[1]}: {run.place} and {runs[0].place} were scored on different samples; prepare the "
                "data once and evaluate both on it"
            )


def _images(run: Run) -> NDArray[np.int64]:
    assert run.samples is not None
    return run.samples.column("image_id").to_numpy()


def _drawn(runs: Sequence[Run], metric: str, weights: NDArray[np.float64]) -> NDArray[np.float64]:
    """A metric of every seed on every draw, [seeds, draws] percent."""
    values = []
    for run in runs:
        assert run.samples is not None
        terms = metric_terms(metric, scored_samples(run.samples, run.results.protocol["ties"]), run.results.kind)
        with np.errstate(invalid="ignore", divide="ignore"):
            top, bottom = weights @ terms.numerator.astype(float), weights @ terms.denominator.astype(float)
            values.append(100 * top / bottom)
    return np.stack(values)


def comparison_markdown(comparison: Comparison) -> str:
    """Means with sample standard deviations over seeds, then the differences."""
    lines: list[str] = []
    for kind in METRICS:
        rows = list(_value_rows(comparison, kind))
        if rows:
            lines += [*markdown([("model", "data set", "split", "seeds", *_names(comparison, kind)), *rows], 3), ""]
    if comparison.differences:
        header, differences = _difference_rows(comparison)
        lines += [*markdown([header, *differences], 4), ""]
        lines += _explanation(comparison.differences)
    return "\n".join([*lines, *comparison.notes])


def _explanation(differences: Sequence[Difference]) -> list[str]:
    """What the columns of the differences say."""
    lines = [
        "95 % intervals: bootstrap over what `covers` names. p: of no difference, from the same draws; p (Holm): "
        f"corrected for the {sum(not math.isnan(d.p) for d in differences)} comparisons of this table. `*`: the "
        "interval leaves out 0 and p (Holm) is below 0.05."
    ]
    if pairs := max((d.seeds.pairs for d in differences if d.seeds), default=0):
        lines.append(
            "t, p (t): paired t-test over seeds; p (flip): sign-flip test over seeds, whose least p with "
            f"{pairs} pairs is {least_p(pairs):.3g}. Results in the same place of both lists have the same seed."
        )
    elif any(d.covers.endswith(" seeds") for d in differences):
        lines.append("No test over seeds: the models do not have as many. Those with one seed are taken as they are.")
    else:
        lines.append("Seeds are not covered: compare several seeds of each model.")
    return lines


def comparison_latex(comparison: Comparison) -> str:
    """Return a booktabs tabular per kind of metric, then one of the differences with their intervals.

    The best mean of every split and metric is bold.
    """
    tabulars = []
    for kind in METRICS:
        names = _names(comparison, kind)
        rows = list(_value_rows(comparison, kind))
        if not rows:
            continue
        bold = []
        for split in {tuple(row[1:3]) for row in rows}:
            own = [i for i, row in enumerate(rows) if tuple(row[1:3]) == split]
            for j in range(4, 4 + len(names)):
                means = [float(rows[i][j].split(" ")[0].replace("-", "nan")) for i in own]
                bold += [(i, j) for i, mean in zip(own, means, strict=True) if len(own) > 1 and mean == max(means)]
        tabulars.append(latex(("Model", "Data set", "Split", "Seeds", *names), rows, bold, text_columns=3))
    if comparison.differences:
        header, differences = _difference_rows(comparison)
        signed = [(*row[:4], *(re.sub(r"-(?=\d)", "\N{MINUS SIGN}", text) for text in row[4:])) for row in differences]
        tabulars.append(latex([*map(str.capitalize, header[:5]), *header[5:]], signed, text_columns=4))
        tabulars.append("\n".join(f"% {line}" for line in _explanation(comparison.differences)))
    return "\n\n".join(tabulars) + "\n"


def _names(comparison: Comparison, kind: Kind) -> list[str]:
    splits = [split for split, own in comparison.kinds.items() if own == kind]
    return list(dict.fromkeys(n for model in comparison.values.values() for s in splits for n in model[s]))


def _value_rows(comparison: Comparison, kind: Kind) -> list[tuple[str, ...]]:
    names = _names(comparison, kind)
    return [
        (model, *split, str(len(next(iter(splits[split].values())))), *(_mean_cell(splits[split][n]) for n in names))
        for split, own in comparison.kinds.items()
        if own == kind
        for model, splits in comparison.values.items()
    ]


def _mean_cell(values: Sequence[float]) -> str:
    mean = cell(float(np.mean(values)))
    return f"{mean} ± {np.std(values, ddof=1):.2f}" if len(values) > 1 else mean


def _difference_rows(comparison: Comparison) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the differences; the t-test's columns are there if a model has several seeds."""
    over_seeds = any(d.seeds for d in comparison.differences)
    header = [
        "model - reference",
        "data set",
        "split",
        "metric",
        "difference",
        "95 % interval",
        "covers",
        "p",
        "p (Holm)",
    ]
    return header + (["t over seeds", "p (t)", "p (flip)"] if over_seeds else []), [
        _difference_row(d, over_seeds) for d in comparison.differences
    ]


def _difference_row(d: Difference, over_seeds: bool) -> list[str]:
    interval = "-" if np.isnan(d.low) else f"{d.low:+.2f} to {d.high:+.2f}{' *' if d.unequal else ''}"
    row = [f"{d.model} - {d.reference}", *d.split, d.metric, f"{d.value:+.2f}", interval, d.covers or "-"]
    row += [_p(d.p), _p(d.p_holm)]
    if not over_seeds:
        return row
    return row + (["-"] * 3 if d.seeds is None else [f"{d.seeds.t:+.2f}", _p(d.seeds.p), _p(d.flip)])


def _p(value: float | None) -> str:
    return "-" if value is None or math.isnan(value) else f"{value:.3f}"


def comparison_dict(comparison: Comparison) -> dict[str, object]:
    """The comparison as JSON values."""
    values = [
        {"model": model, "dataset": split[0], "split": split[1], "metric": metric, "values": seeds}
        for model, splits in comparison.values.items()
        for split, metrics in splits.items()
        for metric, seeds in metrics.items()
    ]
    differences = []
    for d in comparison.differences:
        seeds = {"seeds_t": None, "seeds_p": None} if d.seeds is None else {"seeds_t": d.seeds.t, "seeds_p": d.seeds.p}
        row = {**d._asdict(), **seeds}
        del row["seeds"]
        differences.append({n: None if isinstance(v, float) and np.isnan(v) else v for n, v in row.items()})
    return {"values": values, "differences": differences, "notes": comparison.notes}
