"""Download the original files of RefCOCO, RefCOCO+, RefCOCOg, gRefCOCO and COCO's train2014 images.

    amltrain data download refcoco refcoco+ refcocog grefcoco coco --root data/refer
    amltrain data prepare --dataset refcoco --refer_root data/refer

Known mirrors are tried in order, interrupted downloads resume, and the archives' checksums are verified before anything
is unpacked. COCO's images need about 28 GB while they are unpacked, 14 GB afterwards.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from amltrain.data.download import SOURCES, download
from amltrain.errors import one_line_errors


def build_parser() -> argparse.ArgumentParser:
    """The command line, whose help is this file's docstring."""
    parser = argparse.ArgumentParser(
        prog="amltrain data download", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="+", metavar="NAME", help=", ".join(SOURCES))
    parser.add_argument("--root", type=Path, default=Path("data/refer"), help="folder for the files (data/refer)")
    parser.add_argument("--keep_archives", action="store_true", help="keep the zip files after unpacking")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Download the data sets of the arguments."""
    args = build_parser().parse_args(arguments)
    with one_line_errors():
        download(args.names, args.root, keep_archives=args.keep_archives)
