"""Fine-tune a pretrained model on your own photographs: prepare, choose, train, score, report.

    amltrain finetune photos                       # annotations in any form; the form is found out
    amltrain finetune my.csv --images photos --minutes 20
    amltrain finetune photos --plan                # prepare, show what would be trained and why, and stop
    amltrain finetune photos --optim.lr 3e-4       # your own value for a key of `amltrain train`

Model, size, batch, length and warm-up follow from the data and this machine. Each is printed with its reason and
written to runs/NAME/finetune.yaml. Objects without sentences get some where no object has one. At the end the model is
scored twice: with its own sentences and with those of other samples, which shows whether it reads the words.
The same command continues a run that was stopped.
"""

import argparse
import sys
import webbrowser
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from amltrain.config.files import read_flags
from amltrain.data.catalog import FORM_NAMES
from amltrain.errors import UserError, one_line_errors


def build_parser() -> argparse.ArgumentParser:
    """The command line, whose help is this file's docstring."""
    parser = argparse.ArgumentParser(
        prog="amltrain finetune",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("path", help="annotations: a file, a folder, or prepared data")
    parser.add_argument("--name", help="of the data set (default: the path's name)")
    parser.add_argument(
        "--images", type=Path, help="folder with the pictures (default: where the annotations have them)"
    )
    parser.add_argument("--form", help=f"form of the annotations, if not found out: {', '.join(FORM_NAMES)}")
    parser.add_argument("--output", type=Path, help="folder of the run (default: runs/NAME)")
    parser.add_argument("--prepared", type=Path, default=Path("prepared"), help="folder for prepared data")
    parser.add_argument(
        "--model", help="caris_lite, dual_dinov3_base, caris_swin_base or sam3 (default: by the machine)"
    )
    parser.add_argument("--method", default="supervised", help="training method, e.g. aml (default: supervised)")
    parser.add_argument("--minutes", type=float, help="of training at most, on a CPU (default: 60)")
    parser.add_argument("--seed", type=int, default=0, help="of every random choice (default: 0)")
    parser.add_argument("--plan", action="store_true", help="show what would be trained, and stop")
    parser.add_argument("--open", action="store_true", help="open the report in the browser at the end")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    with one_line_errors():
        args, settings = read(argv)
        from amltrain.finetune import FineTuned, finetune  # imports numpy

        done = finetune(
            args.path,
            args.name,
            output=args.output,
            prepared=args.prepared,
            images=args.images,
            form=args.form,
            model=args.model,
            method=args.method,
            minutes=args.minutes,
            seed=args.seed,
            settings=settings,
            plan_only=args.plan,
        )
        if args.open and isinstance(done, FineTuned) and not webbrowser.open(done.report.resolve().as_uri()):
            print(f"no browser was found; open {done.report}", file=sys.stderr)


def read(argv: Sequence[str] | None = None) -> tuple[argparse.Namespace, dict[str, Any]]:
    """The arguments, and the keys of a run among them. Raises UserError."""
    args, others = build_parser().parse_known_args(argv)
    return args, own_settings(others)


def own_settings(arguments: Sequence[str]) -> dict[str, Any]:
    """Keys of a run among the arguments: --optim.lr 1e-4. Raises UserError for anything else."""
    flags = read_flags(arguments)
    for argument in arguments:
        if argument.startswith("--") and "." not in argument.split("=")[0]:
            raise UserError(f"unknown flag {argument}; see amltrain finetune --help, keys of a run are like --optim.lr")
    if len(arguments) != sum(1 if "=" in a else 2 for a in arguments if a.startswith("--")):
        raise UserError(f"cannot read {' '.join(arguments)}; write --KEY VALUE")
    return {key: yaml.safe_load(value) for key, value in flags.items()}
