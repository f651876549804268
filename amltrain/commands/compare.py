"""Compare models: mean and standard deviation over seeds, and differences with 95 % intervals.

    amltrain compare evaluation/caris-best evaluation/caris_aml-best
    amltrain compare none=eval/none-s0,eval/none-s1,eval/none-s2 aml=eval/aml-s0,eval/aml-s1,eval/aml-s2

Each argument is a model: NAME=RESULTS[,RESULTS...], one for each seed, or RESULTS alone. RESULTS is the folder of an
evaluation, a results.json, or a run. The first model is the reference. Results that were measured under different
protocols are rejected. Intervals need the samples that `amltrain evaluate` writes.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from amltrain.errors import UserError, one_line_errors
from amltrain.run_folder import RESULTS_FILE


def build_parser() -> argparse.ArgumentParser:
    """Build the command line's parser."""
    parser = argparse.ArgumentParser(
        prog="amltrain compare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="+", metavar="[NAME=]RESULTS", help="a model, with one result for each seed")
    parser.add_argument("--metrics", nargs="+", default=[], help="metrics to compare, e.g. oIoU mIoU (default: all)")
    parser.add_argument("--draws", type=int, default=2000, help="bootstrap draws (default: 2000)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the bootstrap (default: 0)")
    parser.add_argument("--output", type=Path, help="folder for comparison.md, .tex and .json (default: print alone)")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    args = build_parser().parse_args(arguments)
    with one_line_errors():
        from amltrain.api import compare

        groups = parse_groups(args.models)
        print(compare(groups, draws=args.draws, seed=args.seed, metrics=args.metrics, output=args.output))


def parse_groups(models: Sequence[str]) -> dict[str, list[str]]:
    """Model name -> places of its results. Raises UserError for a name given twice."""
    groups: dict[str, list[str]] = {}
    for text in models:
        name, equals, places = text.partition("=")
        if not equals:
            path = Path(text)
            name, places = (path.parent if path.name == RESULTS_FILE else path).name, text
        if not name or name in groups:
            raise UserError(f"{text}: the model's name {name!r} is missing or taken; write NAME=RESULTS")
        groups[name] = [place for place in places.split(",") if place]
        if not groups[name]:
            raise UserError(f"{text} names no results; write NAME=RESULTS[,RESULTS...]")
    return groups


if __name__ == "__main__":
    main()
