"""Publish prepared data as a HuggingFace Hub data set, with a card that shows every split and its pictures.

    amltrain data push prepared user/my-data
    amltrain train --data.prepared user/my-data --data.datasets '[mine]'

Parquet files, manifests and the card are pushed; `source/` and everything else stays here. Rerun the same command after
an interruption: files that the Hub has are not sent again. Check the licences of the images first.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from amltrain.commands.push import add_visibility
from amltrain.errors import one_line_errors


def build_parser() -> argparse.ArgumentParser:
    """The command line, whose help is this file's docstring."""
    parser = argparse.ArgumentParser(
        prog="amltrain data push", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="the prepared folder")
    parser.add_argument("repo", metavar="REPO", help="repository, user/name; created if it does not exist")
    parser.add_argument("--dataset", nargs="*", default=[], metavar="NAME", help="data sets to push (default: all)")
    add_visibility(parser)
    parser.add_argument(
        "--benchmark",
        metavar="FRAMEWORK",
        help="also push an eval.yaml, which makes every split but train a task; FRAMEWORK is a name of the Hub's list",
    )
    parser.add_argument("--revision", help="branch to push to; created if it does not exist (default: main)")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Push the data sets of the arguments."""
    args = build_parser().parse_args(arguments)
    with one_line_errors():
        from amltrain.hub.push_data import push_data  # once the arguments are known to be good: torch takes a while

        address = push_data(
            args.folder,
            args.repo,
            private=not args.public,
            names=args.dataset,
            revision=args.revision,
            benchmark=args.benchmark,
        )
        print(f"pushed to {address}")
