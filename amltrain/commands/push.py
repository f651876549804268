"""Publish a model on the HuggingFace Hub: weights, configs, tokenizer, scores and a model card, in one commit.

    hf auth login                                           # once; or set HF_TOKEN
    amltrain push runs/quickstart/best user/caris-refshapes
    amltrain predict --checkpoint user/caris-refshapes --image street.jpg --sentence "the red car"

The card has model, data, protocol and scores (also as the Hub's model-index), recipe, commit, hardware and licences,
as far as the folder knows them, and one prediction that the run drew of its held-out data: --no_picture leaves it out
where photographs must not leave the machine. Scores are those of the run's own evaluation, or of --results. Pushing
again makes a new commit; nothing is uploaded twice. A run pushes by itself with --hub.push best --hub.repo user/name.
A run's whole state, to go on with it on another machine (private; also --hub.push state while it trains):

    amltrain push runs/mine user/mine --state
    amltrain train --resume user/mine
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from amltrain.errors import one_line_errors


def build_parser() -> argparse.ArgumentParser:
    """Build the command line's parser."""
    parser = argparse.ArgumentParser(
        prog="amltrain push", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="RUN/best, RUN/last, RUN/step-N or a model folder")
    parser.add_argument("repo", metavar="REPO", help="repository, user/name; made when it is not there")
    add_visibility(parser)
    parser.add_argument("--no_picture", action="store_true", help="without a picture of a prediction on the card")
    parser.add_argument("--state", action="store_true", help="FOLDER is a run: push all that resuming it needs, too")
    parser.add_argument("--revision", help="branch to push to; made when it is not there (default: main)")
    parser.add_argument("--dry_run", action="store_true", help="check everything, push nothing, print files and card")
    parser.add_argument("--results", type=Path, help="results.json of amltrain evaluate for the card")
    parser.add_argument(
        "--benchmark",
        metavar="DATASET",
        help="Hub data set with an eval.yaml: also push the scores as .eval_results, for its leaderboard",
    )
    return parser


def add_visibility(parser: argparse.ArgumentParser) -> None:
    """Add --public, and --private, which is the default since 0.3 and still taken; not both."""
    either = parser.add_mutually_exclusive_group()
    either.add_argument("--public", action="store_true", help="a new repository is public (default: private)")
    either.add_argument("--private", action="store_true", help=argparse.SUPPRESS)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    args = build_parser().parse_args(arguments)
    with one_line_errors():
        from amltrain.hub.push import push_model  # once the arguments are known to be good: torch takes a while

        address = push_model(
            args.folder,
            args.repo,
            private=not args.public,
            revision=args.revision,
            results_file=args.results,
            dry_run=args.dry_run,
            benchmark=args.benchmark,
            picture=not args.no_picture,
            state=args.state,
        )
        print(address if args.dry_run else f"pushed to {address}")
