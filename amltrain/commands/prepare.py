"""`launch/prepare_data.py` and `amltrain prepare`: original REFER files and images -> Parquet that `datasets` reads.

    python launch/prepare_data.py --dataset combined --refer_root data/refer --image_root data/train2014

Reads `<refer_root>/refcoco/refs(unc).p` and `instances.json` (gRefCOCO: `grefs(unc).json`), decodes every image once,
and writes `<output>/<dataset>/*.parquet` with a manifest of counts. Several data sets also get the list of images
that a combined training leaves out. docs/data.md says where the original files are found.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from amltrain.data.leakage import held_out_images, read_image_ids, write_combined_manifest
from amltrain.data.prepare import describe, prepare
from amltrain.data.splits import COMBINED, DATASETS, dataset_spec
from amltrain.errors import one_line_errors


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="prepare_data.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--dataset",
        nargs="+",
        required=True,
        metavar="NAME",
        help=f"{', '.join(DATASETS)}; combined = {' '.join(COMBINED)}",
    )
    parser.add_argument("--refer_root", type=Path, required=True, help="folder in the original REFER layout")
    parser.add_argument("--image_root", type=Path, help="COCO train2014; default: looked for under refer_root")
    parser.add_argument("--output", type=Path, default=Path("prepared"), help="where the prepared data goes")
    parser.add_argument(
        "--max_skipped", type=float, default=0.001, help="share of expressions that may be unusable (default 0.001)"
    )
    parser.add_argument(
        "--also_held_out", nargs="*", default=[], metavar="NAME", help="prepared data sets whose val and test count too"
    )
    parser.add_argument("--held_out_ids", type=Path, help="JSON list of further image ids to leave out")
    parser.add_argument("--no_leak_filter", action="store_true", help="combined training keeps images of val and test")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Prepare what the arguments name and say what there is."""
    args = build_parser().parse_args(argv)
    with one_line_errors():
        names = list(dict.fromkeys(n for name in args.dataset for n in (COMBINED if name == "combined" else [name])))
        for name in names:
            if dataset_spec(name).shares_images:
                print(f"note: {name} trains and evaluates on the same images; the umd split (refcocog) does not")
            manifest = prepare(
                name, args.refer_root, args.output, image_root=args.image_root, max_skipped=args.max_skipped
            )
            print(describe(manifest))
        if len(names) > 1:
            print(f"combined training: {combine(names, args)}")


def combine(names: Sequence[str], args: argparse.Namespace) -> Path:
    """Write the manifest of a combined training and return its path."""
    excluded = held_out_images(str(args.output), [*names, *args.also_held_out])
    if args.held_out_ids is not None:
        excluded |= read_image_ids(args.held_out_ids)
    return write_combined_manifest(str(args.output), names, excluded, leak_filter=not args.no_leak_filter)
