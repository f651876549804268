"""Describe this machine on one screen: versions, devices, memory, limits, Hub login. Paste it into a bug report.

    amltrain doctor
    amltrain doctor --output /data/runs      # test the file system that runs are written to

Lines that start with "!" name a problem and its fix. Nothing is sent anywhere; no path or token is printed.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from amltrain.errors import one_line_errors


def build_parser() -> argparse.ArgumentParser:
    """Build the command line's parser."""
    parser = argparse.ArgumentParser(
        prog="amltrain doctor", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--output", type=Path, default=Path(), help="folder whose file system is tested (default: here)"
    )
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the description."""
    args = build_parser().parse_args(arguments)
    with one_line_errors():
        from amltrain.environment import diagnose_machine  # imports torch

        for fact, text in diagnose_machine(args.output):
            print(f"{'! ' if text.startswith('PROBLEM: ') else '  '}{fact:14} {text.removeprefix('PROBLEM: ')}")
