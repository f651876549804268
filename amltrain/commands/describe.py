"""Write referring expressions for objects that have classes and masks but no sentences.

    amltrain data describe coco/annotations --images coco/train2017 --output sentences.jsonl
    amltrain data prepare --table sentences.jsonl --images coco/train2017 --name mine

"the left person", "the second cup from the right", "the largest dog", "the red car", "the bottle nearest to the chair":
each is written only if it fits exactly one object of its picture. `amltrain data prepare PATH --describe` does both
steps at once. The table can be read, corrected and extended before it is prepared.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from amltrain.data.catalog import FORM_NAMES
from amltrain.errors import UserError, one_line_errors


def add_options(parser: argparse._ActionsContainer) -> None:
    """Add the options of describing, which `prepare --describe` shares."""
    parser.add_argument("--sentences", type=int, default=3, help="at most so many for each object (default 3)")
    parser.add_argument(
        "--negatives", type=int, default=0, help="sentences that fit nothing, at most so many per picture (default 0)"
    )


def build_parser() -> argparse.ArgumentParser:
    """The command line, whose help is this file's docstring."""
    parser = argparse.ArgumentParser(
        prog="amltrain data describe", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("path", type=Path, help="annotations of a tool: a file or a folder")
    parser.add_argument("--form", help=f"form of the annotations, where it is not found out: {', '.join(FORM_NAMES)}")
    parser.add_argument("--images", type=Path, help="folder with the pictures (default: where the form has them)")
    parser.add_argument("--label_field", help="FiftyOne: the field of the samples that has the objects")
    parser.add_argument("--encoding", help="of text files that are not UTF-8")
    parser.add_argument("--follow_links", action="store_true", help="read pictures through links that leave the folder")
    parser.add_argument("--seed", type=int, default=0, help="of every choice")
    parser.add_argument("--output", type=Path, required=True, help="the table to write (.jsonl)")
    add_options(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    args = build_parser().parse_args(argv)
    with one_line_errors():
        if args.output.suffix != ".jsonl":
            raise UserError(f"--output {args.output} should end in .jsonl")
        from amltrain.data.sources.describe import DescribeOptions
        from amltrain.data.sources.describe_rows import describe_rows
        from amltrain.data.sources.detect import FORMS, detect, read_form
        from amltrain.data.sources.objects import ImportOptions
        from amltrain.files import write_text

        form = args.form or detect(args.path).form
        if form not in FORMS:
            raise UserError(f"{args.path} is read as {form}, which has its own sentences; known: {', '.join(FORMS)}")
        options = ImportOptions(args.images, args.output.parent / "pictures", args.encoding, args.label_field)
        choice = DescribeOptions(args.sentences, args.negatives, args.seed)
        imported = describe_rows(read_form(args.path, form, options), choice, links=args.follow_links)
        lines = []
        for row in imported.rows:
            entry = {"image": row.image, "sentences": list(row.sentences), "mask": row.segmentation}
            entry |= {"split": row.split, "category": row.category, "no_target": row.segmentation is None}
            size = dict(zip(("height", "width"), row.size, strict=True)) if row.size else {}
            lines.append(json.dumps(entry | size, ensure_ascii=False))
        write_text(args.output, "\n".join(lines) + "\n")
        print("\n".join(imported.notes))
        print(f"prepare it: amltrain data prepare --table {args.output} --images {imported.images} --name NAME")
