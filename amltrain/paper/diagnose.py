"""What alignment scores know: does a score find the referent, and does it need the sentence?

    amltrain analyse diagnose --models none=runs/none aml=runs/aml
    amltrain analyse diagnose --models runs/aml --checkpoints --scorers paper late grounded

Every score is computed on the same samples. A temperature is solved once, on the first model or checkpoint, and used
for all (Tables 12 and 13, Fig. 6 of the AML paper). The table has, among others:

    auc            chance that a patch of the referent scores above a patch of the background; 0.5 = it knows nothing
    auc shuffled   the same with another sample's sentence; what remains is not knowledge of the sentence
    agreement      correlation of the score maps of two random projections
    referent ratio how much more often the referent is masked than the background

`grounded` scores are fitted on the training split first, as a run trains them beside the model.

`amltrain analyse diagnose`: from models and scorers to a table, a CSV and pictures.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from amltrain.errors import UserError, one_line_errors
from amltrain.paper.analyse import add_data


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="amltrain analyse diagnose", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
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
        from amltrain.paper.diagnose_models import diagnose  # imports torch

        print(diagnose(args))


if __name__ == "__main__":
    main()
