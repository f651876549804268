"""Write one HTML file about a run: training curves, scores, and predictions to look at.

    amltrain report runs/quickstart
    amltrain report runs/caris --splits val testA --pictures 90 --samples 17 42
    amltrain report runs/caris --results evaluation/caris-best
    amltrain report runs/mine --before sam3-folder --datasets mine phrases      # what was gained, what was forgotten

Scores the checkpoint on the splits, then shows the best, worst and random predictions: sentence, truth, prediction,
errors, alignment scores, and the blocks that AML masks. The file needs no network and no server.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from amltrain.errors import one_line_errors
from amltrain.run_folder import find_model_folder


def build_parser() -> argparse.ArgumentParser:
    """Build the command line's parser."""
    parser = argparse.ArgumentParser(
        prog="amltrain report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("run", help="folder of a run, or a checkpoint, a model folder or a Hub repository")
    parser.add_argument("--checkpoint", default="best", help="of a run: best, last or step-N (default: best)")
    parser.add_argument("--splits", nargs="+", help="splits to score (default: the run's evaluation.splits)")
    parser.add_argument("--datasets", nargs="+", help="data sets to score on (default: those of the training)")
    parser.add_argument("--prepared", help="folder with the prepared data (default: the run's data.prepared)")
    parser.add_argument(
        "--before", metavar="MODEL", help="a run or model from before the training, shown and scored beside"
    )
    parser.add_argument("--results", help="folder of an evaluation of this model: show its scores, score nothing again")
    parser.add_argument("--output", help="HTML file to write (default: RUN/report.html)")
    parser.add_argument("--pictures", type=int, default=60, help="predictions shown per split (default: 60)")
    parser.add_argument(
        "--samples", type=int, nargs="+", default=[], help="sample ids to show in any case, of the first split"
    )
    parser.add_argument("--side", type=int, default=320, help="longest side of a picture in pixels (default: 320)")
    parser.add_argument("--max_samples", type=int, help="score only this many samples of each split")
    parser.add_argument("--batch_size", type=int, default=16, help="samples per forward pass (default: 16)")
    parser.add_argument("--seed", type=int, default=0, help="of the random predictions (default: 0)")
    parser.add_argument("--mixed_precision", choices=["no", "fp16", "bf16"], default="no", help="no is fp32 (default)")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    args = build_parser().parse_args(arguments)
    with one_line_errors():
        if not Path(args.run).exists():
            find_model_folder(args.run)  # before the imports
        from amltrain.report.page import ReportOptions, report  # imports torch

        path = report(ReportOptions(**vars(args)))
        print(f"report -> {path} ({path.stat().st_size / 1e6:.1f} MB)")
