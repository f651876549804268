"""What alignment scores know: does a score find the referent, and does it need the sentence?

    amltrain diagnose --models none=runs/none aml=runs/aml
    amltrain diagnose --models runs/aml --checkpoints --scorers paper late grounded

Every score is computed on the same samples. A temperature is solved once, on the first model or checkpoint, and used
for all (Tables 12 and 13, Fig. 6 of the AML paper). The table has, among others:

    auc            chance that a patch of the referent scores above a patch of the background; 0.5 = it knows nothing
    auc shuffled   the same with another sample's sentence; what remains is not knowledge of the sentence
    agreement      correlation of the score maps of two random projections
    referent ratio how much more often the referent is masked than the background

`grounded` scores are fitted on the training split first, as a run trains them beside the model.

`amltrain diagnose`: from models and scorers to a table, a CSV and pictures.
"""

import argparse
import csv
import io
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from accelerate import Accelerator
from accelerate.utils import send_to_device
from numpy.typing import NDArray

from amltrain.config.schema import DataConfig, ProtocolOverrides
from amltrain.data.transforms import normalise_batch
from amltrain.errors import UserError, one_line_errors, unknown_name
from amltrain.evaluation.results import run_protocol, write_text
from amltrain.methods.aml.scorers import GroundedScorer
from amltrain.paper.alignment import (
    CANDIDATES,
    candidate_masker,
    collect_scores,
    draw_dynamics,
    draw_histogram,
    fit_grounded,
    fits_model,
    has_temperature,
    score_histogram,
    score_statistics,
    statistics_table,
)
from amltrain.paper.analyse import add_data
from amltrain.paper.analyse_alignment import run_checkpoints
from amltrain.paper.analysed import Analysed, data_of, load_models, loaders_of, moved, parse_models, single_process


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="amltrain diagnose", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", required=True, nargs="+", metavar="[NAME=]PLACE", help="models to compare")
    parser.add_argument(
        "--checkpoints", action="store_true", help="every checkpoint of the one run that --models names"
    )
    parser.add_argument(
        "--scorers",
        nargs="+",
        default=["paper"],
        help="paper, late, late_identity, identity, cosine, prediction, grounded, grounded_late, or all "
        "(default: paper)",
    )
    parser.add_argument("--output", type=Path, default=Path("analysis/diagnose"), help="folder (default: %(default)s)")
    parser.add_argument("--batches", type=int, default=20, help="batches scored (default: 20)")
    parser.add_argument("--calibration", type=int, default=4, help="batches the temperature is solved on (default: 4)")
    parser.add_argument("--fit_batches", type=int, default=60, help="training batches for grounded (default: 60)")
    add_data(parser)
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    args = build_parser().parse_args(arguments)
    with one_line_errors():
        for name in ("batch_size", "max_samples", "batches", "calibration", "fit_batches"):
            value = getattr(args, name)
            if value is not None and value < 1:
                raise UserError(f"--{name} is {value} and must be at least 1")
        if args.batch_size == 1:
            raise UserError("--batch_size is 1; sentences are exchanged inside a batch, which needs at least 2 samples")
        pass

        print(diagnose(args))


if __name__ == "__main__":
    main()


SHOWN = (
    "score_mean",
    "score_std",
    "below_0.4",
    "referent_below_0.4",
    "masked_image",
    "referent_ratio",
    "auc",
    "auc_shuffled",
    "agreement",
)
"""Columns of the table; the CSV has all."""


class Diagnosis(NamedTuple):
    """Statistics of one scorer on one model, its histogram [BINS], and its temperature (None = it has none)."""

    scorer: str
    model: str
    statistics: dict[str, float]
    histogram: NDArray[np.float64]
    temperature: float | None


def diagnose(args: argparse.Namespace) -> str:
    """Score the models' samples with every scorer; write OUTPUT/diagnose.md, .csv and pictures; return the table."""
    scorers = list(CANDIDATES) if args.scorers == ["all"] else args.scorers
    for name in scorers:
        if name not in CANDIDATES:
            raise unknown_name("--scorers", name, CANDIDATES)
    places = _places(args)
    data = data_of(args, next(iter(places.values())))
    accelerator = single_process(data)
    found: list[Diagnosis] = []
    left_out: dict[str, str] = {}
    temperatures: dict[str, float] = {}
    for name, place in places.items():
        [model] = load_models([f"{name}={place}"])
        found += _diagnose_model(args, accelerator, data, model, scorers, temperatures, left_out)
    if not found:
        raise UserError(f"the model can have none of these scores: {'; '.join(left_out.values())}")
    text = _table(found, temperatures, left_out)
    write_text(args.output / "diagnose.md", text + "\n")
    write_text(args.output / "diagnose.csv", _csv(found))
    _draw(args, found)
    return text


def _places(args: argparse.Namespace) -> dict[str, str]:
    places = parse_models(args.models)
    if not args.checkpoints:
        return places
    if len(places) > 1:
        raise UserError("--checkpoints follows one run; give --models one run folder")
    return {f"step {step:,}": str(folder) for step, folder in run_checkpoints(Path(next(iter(places.values()))))}


def _diagnose_model(
    args: argparse.Namespace,
    accelerator: Accelerator,
    data: DataConfig,
    model: Analysed,
    scorers: list[str],
    temperatures: dict[str, float],
    left_out: dict[str, str],
) -> list[Diagnosis]:
    """Every scorer on one model. temperatures: by scorer, filled by the first model; left_out: why, by scorer."""
    network = moved(accelerator, model)
    batches = _batches(args, accelerator, data, model, args.split, args.batches)
    found = []
    for name in scorers:
        if reason := fits_model(network, name):
            left_out[name] = f"{name}: {reason}"
            continue
        masker = candidate_masker(
            network, name, batches[: args.calibration], temperature=temperatures.get(name), seed=args.seed
        )
        if isinstance(masker.scorer, GroundedScorer):
            fit_grounded(network, masker.scorer, _batches(args, accelerator, data, model, "train", args.fit_batches))
        temperature = float(masker.scorer.temperature) if has_temperature(masker.scorer) else None  # type: ignore[union-attr, arg-type]
        if temperature is not None:
            temperatures[name] = temperature
        collected = collect_scores(network, masker, batches)
        statistics = score_statistics(collected, masker.block)
        found.append(Diagnosis(name, model.name, statistics, score_histogram(collected), temperature))
    return found


def _batches(
    args: argparse.Namespace, accelerator: Accelerator, data: DataConfig, model: Analysed, split: str, count: int
) -> list[Any]:
    """The first batches of a split of all data sets, on the device."""
    protocol = run_protocol(model.pretrained.protocol, data, ProtocolOverrides())
    loaders = loaders_of(argparse.Namespace(**{**vars(args), "split": split}), data, model, protocol)
    normalization = model.pretrained.preprocess.normalization
    batches = itertools.islice(itertools.chain.from_iterable(loaders.values()), count)
    return [normalise_batch(send_to_device(batch, accelerator.device), normalization) for batch in batches]


def _table(found: list[Diagnosis], temperatures: Mapping[str, float], left_out: Mapping[str, str]) -> str:
    rows = {f"{d.scorer}, {d.model}": {name: d.statistics[name] for name in SHOWN} for d in found}
    lines = [statistics_table(rows, "score, model"), ""]
    if temperatures:
        named = ", ".join(f"{name} {value:.4g}" for name, value in temperatures.items())
        lines.append(f"Temperatures, solved on {found[0].model} and used for all: {named}.")
    return "\n".join([*lines, *left_out.values()]).rstrip()


def _csv(found: list[Diagnosis]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["scorer", "model", "temperature", *found[0].statistics])
    for d in found:
        temperature = "" if d.temperature is None else f"{d.temperature:.6g}"
        writer.writerow([d.scorer, d.model, temperature, *(f"{value:.6g}" for value in d.statistics.values())])
    return text.getvalue()


def _draw(args: argparse.Namespace, found: list[Diagnosis]) -> None:
    """A histogram for every scorer, and its curves where the models are checkpoints."""
    for name in dict.fromkeys(d.scorer for d in found):
        own = [d for d in found if d.scorer == name]
        draw_histogram({d.model: d.histogram for d in own}, args.output / f"histogram_{name}.png")
        if args.checkpoints:
            steps = [int(d.model.removeprefix("step ").replace(",", "")) for d in own]
            draw_dynamics(steps, [d.statistics for d in own], args.output / f"dynamics_{name}.png")
