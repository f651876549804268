"""Write a trained model as a torch.export program and as ONNX, to run it without amltrain.

    amltrain export --checkpoint runs/quickstart/best --output exported/quickstart
    python exported/quickstart/run_onnx.py street.jpg "red car on the left" mask.png

Every file is loaded again and compared with the model. ONNX needs `pip install onnx onnxruntime onnxscript`.

    amltrain export --checkpoint runs/gsva/best --output models/gsva --merged

writes one whole model folder instead: low-rank updates added to the weights, and frozen weights that the checkpoint
left out put back.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from amltrain.config.fields import ANY, check_number
from amltrain.errors import UserError, one_line_errors
from amltrain.inference import FORMATS, missing_for_onnx
from amltrain.run_folder import find_model_folder


def build_parser() -> argparse.ArgumentParser:
    """Build the command line's parser."""
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
    parser.add_argument("--merged", action="store_true", help="write a whole model folder, without low-rank updates")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    args = build_parser().parse_args(arguments)
    with one_line_errors():
        check_number("--runs", args.runs, 1, ANY)
        checkpoint = args.checkpoint if args.revision is None else f"{args.checkpoint}@{args.revision}"
        find_model_folder(checkpoint)  # before the imports
        if args.merged:
            from amltrain.hub.model_folder import load_pretrained
            from amltrain.inference.merge import merge_folder

            count = merge_folder(load_pretrained(checkpoint), Path(args.output))
            print(f"{count} low-rank updates added -> {args.output}")
            return
        if lacking := missing_for_onnx(args.formats):
            print(f"onnx is left out: {lacking}", file=sys.stderr)
            if list(args.formats) == ["onnx"]:
                raise UserError(f"--formats onnx cannot be written: {lacking}")
        from amltrain.api import export

        rows = export(checkpoint, args.output, formats=args.formats, runs=args.runs)
        from amltrain.inference.export import table

        print(table(rows))
        for row in rows:
            if row.note:
                print(f"{row.format}: {row.note}", file=sys.stderr)
        print(f"-> {args.output}")
