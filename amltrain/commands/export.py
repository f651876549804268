"""Write a trained model as a torch.export program and as ONNX, to run it without amltrain.

    amltrain export --checkpoint runs/quickstart/best --output exported/quickstart
    python exported/quickstart/run_onnx.py street.jpg "red car on the left" mask.png

Every file is loaded again and compared with the model. ONNX needs `pip install amltrain[export]`.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from amltrain.config.fields import ANY, check_number
from amltrain.errors import UserError, one_line_errors
from amltrain.inference.export import FORMATS
from amltrain.run_folder import find_model_folder


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="amltrain export",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--checkpoint", required=True, help="model folder, checkpoint folder or Hub repository")
    parser.add_argument("--revision", help="branch, tag or commit of a Hub repository")
    parser.add_argument("--output", required=True, help="new or empty folder for the files")
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=list(FORMATS), help="default: both")
    parser.add_argument("--runs", type=int, default=5, help="images that are timed for each format (default: 5)")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    args = build_parser().parse_args(arguments)
    with one_line_errors():
        check_number("--runs", args.runs, 1, ANY)
        folder = Path(args.output)
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise UserError(f"{folder} is not an empty folder; choose another --output")
        find_model_folder(args.checkpoint, args.revision)  # before the imports
        from amltrain.hub.model_folder import load_pretrained
        from amltrain.inference.export import export_folder, table  # imports torch

        rows = export_folder(load_pretrained(args.checkpoint, revision=args.revision), folder, args.formats, args.runs)
        print(table(rows))
        for row in rows:
            if row.note:
                print(f"{row.format}: {row.note}", file=sys.stderr)
        print(f"-> {folder}")
