"""Make the AML paper's tables and figures: train and evaluate what is missing, then write published and own values.

    amltrain paper reproduce table4                              # tiny scale: minutes on a CPU, compares with nothing
    amltrain paper reproduce table4 --scale full --dry_run       # the commands of the real thing
    amltrain paper reproduce table4 --scale full --seeds 0 1 2 --flags --train.micro_batch_size 4
    amltrain paper reproduce all --fill_only                     # fill the tables from what has been run

What is finished is not run again; what was interrupted resumes. Full scale trains the recipes into their own folders
(runs/paper/...), so runs that you start by hand, e.g. on many GPUs, count. Tables are written as Markdown, LaTeX and
JSON, with the protocol of every value, to OUTPUT/SCALE/tables; OUTPUT/status.md lists all that were made.

Run the commands of tables, and write the tables: what `amltrain paper reproduce` does after its arguments are read.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from amltrain.errors import UserError, one_line_errors


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="amltrain paper reproduce", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("tables", nargs="*", metavar="TABLE", help="tables and figures, e.g. table4 figure6; or all")
    parser.add_argument("--list", action="store_true", help="list the tables with their recipes")
    parser.add_argument("--scale", choices=["tiny", "full"], default="tiny", help="default: tiny")
    parser.add_argument("--steps", type=int, help="steps of a tiny run (default: 24)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="one run of everything each (default: 0)")
    parser.add_argument("--prepared", default="prepared", help="folder of the prepared data at full scale (prepared)")
    parser.add_argument("--output", type=Path, default=Path("runs/reproduce"), help="folder (default: %(default)s)")
    parser.add_argument("--dry_run", action="store_true", help="print the commands that would run, and run nothing")
    parser.add_argument("--fill_only", action="store_true", help="run nothing; fill the tables from what is there")
    flags_help = "what follows goes to every `amltrain train`, e.g. --flags --processes 8"
    parser.add_argument("--flags", nargs=argparse.REMAINDER, default=[], help=flags_help)
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    args = build_parser().parse_args(arguments)
    with one_line_errors():
        from amltrain.paper.page import table_list
        from amltrain.paper.tables import find_tables

        if args.list:
            print(table_list())
            return
        if not args.tables:
            raise UserError("name a table, e.g. table4; `amltrain paper reproduce --list` lists them")
        if args.steps is not None and (args.steps < 1 or args.scale == "full"):
            raise UserError("--steps must be at least 1, and is for --scale tiny; a recipe has its own length")
        if len(set(args.seeds)) < len(args.seeds) or min(args.seeds) < 0:
            raise UserError("--seeds must be different numbers from 0 on")
        tables = find_tables(args.tables)
        from amltrain.paper.run_tables import reproduce  # imports torch

        reproduce(tables, args)


if __name__ == "__main__":
    main()
