"""The analyses of the AML paper and an error analysis, one command each; every one writes a table and a picture.

    amltrain analyse robustness --models none=runs/none aml=runs/aml --datasets refcoco refcocog     (Table 15)
    amltrain analyse occlusion --models none=runs/n1,runs/n2 aml=runs/a1,runs/a2 --shares 0 0.3 0.5  (Fig. 4b)
    amltrain analyse activation --models none=runs/none aml=runs/aml --count 4                       (Figs. 4a, 5)
    amltrain analyse pictures --models none=runs/none aml=runs/aml --samples 17 42 --format pdf
    amltrain analyse convergence --models none=runs/none aml=runs/aml                                (Table 14)
    amltrain analyse losses --models none=runs/none aml=runs/aml --split train --pairs 2048          (Table 14)
    amltrain analyse errors --results evaluation/aml-best
    amltrain analyse histogram --models none=runs/none aml=runs/aml --batches 20                     (Fig. 6)
    amltrain analyse dynamics --models runs/aml                                                      (Tables 12, 13)

Models are runs, model folders or Hub repositories, as NAME=PLACE or PLACE; differences are to the first one.
Robustness and occlusion take several seeds of a model, NAME=PLACE,PLACE: mean and standard deviation.
`amltrain analyse NAME --help` lists the options of one analysis.
"""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

from amltrain.errors import UserError, one_line_errors

DATA = ("robustness", "occlusion", "activation", "pictures", "histogram", "dynamics", "losses")
"""Analyses that run models on data."""
ABOUT = {
    "robustness": "seven perturbations, with the clean row, averages and differences",
    "occlusion": "a share of the image covered, with the drops",
    "activation": "maps of the decoder's positive and negative evidence for the referent",
    "pictures": "predictions of chosen samples side by side, as a figure for a paper",
    "convergence": "mean training loss of every epoch, from the runs' logs",
    "losses": "mean loss on whole images over the checkpoints of runs, on the same pairs",
    "errors": "scores by length and kind of expression, object size, distractors, category; worst cases",
    "histogram": "distribution of AML's alignment scores under several models",
    "dynamics": "AML's alignment scores over the checkpoints of a run",
}


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="amltrain analyse", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="analysis", required=True, metavar="ANALYSIS")
    for name, about in ABOUT.items():
        sub = commands.add_parser(name, help=about, description=about)
        sub.add_argument("--output", type=Path, default=Path("analysis") / name, help="folder (default: %(default)s)")
        sub.add_argument("--format", choices=("png", "pdf"), default="png", help="of the picture (default: png)")
        if name == "errors":
            sub.add_argument("--results", required=True, type=Path, help="evaluation folder, results.json or run")
            sub.add_argument("--split", help="DATASET:SPLIT (default: every split)")
            sub.add_argument("--worst", type=int, default=20, help="worst cases listed (default: 20)")
            continue
        sub.add_argument("--models", required=True, nargs="+", metavar="[NAME=]PLACE[,PLACE]", help="models to compare")
        if name in DATA:
            add_data(sub)
    commands.choices["occlusion"].add_argument(
        "--shares", type=float, nargs="+", default=[0, 0.3, 0.5], help="covered shares of the image (default: 0 .3 .5)"
    )
    for name in ("robustness", "occlusion"):
        commands.choices[name].add_argument("--metric", default="oIoU", help="metric shown (default: oIoU)")
    for name in ("activation", "pictures"):
        commands.choices[name].add_argument("--count", type=int, default=4, help="samples drawn (default: 4)")
    commands.choices["pictures"].add_argument(
        "--samples", type=int, nargs="+", default=[], metavar="ID", help="sample ids, of samples/*.parquet or a report"
    )
    for name in ("histogram", "dynamics"):
        sub = commands.choices[name]
        sub.add_argument("--batches", type=int, default=10, help="batches scored (default: 10)")
        sub.add_argument("--calibration", type=int, default=2, help="batches the temperature is solved on (default: 2)")
        sub.add_argument("--pairs", type=int, help="score this many pairs, spread over the split, instead of --batches")
    pairs_help = "pairs spread over the split, the same for every model (default: 512)"
    commands.choices["losses"].add_argument("--pairs", type=int, default=512, help=pairs_help)
    return parser


def add_data(sub: argparse.ArgumentParser) -> None:
    """Add the flags that choose the data which models are run on."""
    sub.add_argument("--datasets", nargs="+", default=[], help="data sets (default: the first model's)")
    sub.add_argument("--split", default="val", help="split of every data set (default: val)")
    sub.add_argument("--prepared", help="folder of the prepared data (default: the first model's)")
    sub.add_argument("--batch_size", type=int, default=16, help="samples per forward pass (default: 16)")
    sub.add_argument("--max_samples", type=int, help="only the first samples of every split")
    sub.add_argument("--workers", type=int, default=2, help="data loading processes (default: 2)")
    sub.add_argument("--seed", type=int, default=0, help="seed of perturbations (default: 0)")


def main(arguments: Sequence[str] | None = None) -> None:
    args = build_parser().parse_args(arguments)
    with one_line_errors():
        for name in ("batch_size", "max_samples", "count", "batches", "calibration", "pairs", "worst"):
            value = getattr(args, name, None)
            if value is not None and value < 1:
                raise UserError(f"--{name} is {value} and must be at least 1")
        print(_analysis(args.analysis)(args))


def _analysis(name: str) -> Callable[[argparse.Namespace], str]:
    """Import an analysis only when it is used: torch and matplotlib take seconds."""
    if name in ("histogram", "dynamics"):
        from amltrain.paper import analyse_alignment

        return getattr(analyse_alignment, name)
    if name == "losses":
        from amltrain.paper import analyse_alignment as analyse_losses

        return analyse_losses.losses
    if name == "pictures":
        from amltrain.paper import analyse_pictures

        return analyse_pictures.pictures
    from amltrain.paper import analyse_models

    return getattr(analyse_models, name)


if __name__ == "__main__":
    main()
