"""Turn annotations and images into Parquet that `datasets` reads.

    amltrain prepare --dataset combined --refer_root data/refer --image_root data/train2014
    amltrain prepare --dataset refcoco --hub jxu124/refcoco --image_root data/train2014

Reads `<refer_root>/refcoco/refs(unc).p` and `instances.json` (gRefCOCO: `grefs(unc).json`), or the same annotations
from the Hub, decodes every image once, and writes `<output>/<dataset>/*.parquet` with a manifest of counts. Several
data sets also get the list of images that a combined training leaves out. docs/data.md says where the files are found.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from amltrain.config.schema import COMBINED
from amltrain.data.leakage import combined_path, excluded_images, read_image_ids, write_combined_manifest
from amltrain.data.prepare import describe, prepare, prepare_files
from amltrain.data.refer import refer_paths
from amltrain.data.specs import DATASETS, dataset_spec
from amltrain.errors import UserError, one_line_errors

GROUPS = {"combined": True, "combined-unfiltered": False}
"""Names for RefCOCO, RefCOCO+ and RefCOCOg (umd) together, and whether the leak filter is on."""


def build_parser() -> argparse.ArgumentParser:
    """The command line, whose help is this file's docstring."""
    parser = argparse.ArgumentParser(
        prog="amltrain prepare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--dataset",
        nargs="+",
        required=True,
        metavar="NAME",
        help=f"{', '.join(DATASETS)}; or combined = {' '.join(COMBINED)}, from whose training every image is dropped "
        f"that any of them evaluates on; or combined-unfiltered, which keeps them",
    )
    parser.add_argument("--refer_root", type=Path, help="folder in the original REFER layout")
    parser.add_argument(
        "--hub",
        nargs="+",
        metavar="ID",
        help="instead of refer_root: for every data set a Hub id like jxu124/refcoco, or a folder with its files",
    )
    parser.add_argument("--image_root", type=Path, help="COCO train2014; default: looked for under refer_root")
    parser.add_argument("--output", type=Path, default=Path("prepared"), help="where the prepared data goes")
    parser.add_argument(
        "--max_skipped", type=float, default=0.001, help="share of expressions that may be unusable (default 0.001)"
    )
    parser.add_argument(
        "--also_held_out", nargs="*", default=[], metavar="NAME", help="prepared data sets whose val and test count too"
    )
    parser.add_argument("--held_out_ids", type=Path, help="JSON list of further image ids to leave out")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Prepare what the arguments name and say what there is."""
    args = build_parser().parse_args(argv)
    with one_line_errors():
        names = list(dict.fromkeys(n for name in args.dataset for n in (COMBINED if name in GROUPS else [name])))
        leak_filter = all(GROUPS.get(name, True) for name in args.dataset)
        sources = _sources(names, args)
        _check_options(names, args, leaves_out=len(names) > 1 and leak_filter)
        _check_sources(names, sources, args.refer_root)
        for name, source in zip(names, sources, strict=True):
            if dataset_spec(name).shares_images:
                print(f"note: {name} trains and evaluates on the same images; the umd split (refcocog) does not")
            print(describe(_prepare(name, source, args)))
        if len(names) > 1:
            excluded = excluded_images(
                str(args.output), names, also_held_out=args.also_held_out, held_out_ids=args.held_out_ids
            )
            path = combined_path(str(args.output), names, leak_filter)
            print(write_combined_manifest(path, str(args.output), names, excluded if leak_filter else set()))


def _sources(names: Sequence[str], args: argparse.Namespace) -> list[str | None]:
    """For every data set where on the Hub it comes from; None = from refer_root."""
    if args.hub is None:
        if args.refer_root is None:
            raise UserError("give --refer_root, the folder with the original files, or --hub")
        return [None] * len(names)
    if args.refer_root is not None:
        raise UserError("--hub stands for --refer_root; leave one of them out (the images come from --image_root)")
    if args.image_root is None:
        raise UserError("--hub needs --image_root, the folder with COCO's train2014 images")
    if len(args.hub) != len(names):
        raise UserError(f"--hub names {len(args.hub)} sources for {len(names)} data sets ({', '.join(names)})")
    return list(args.hub)


def _check_options(names: Sequence[str], args: argparse.Namespace, *, leaves_out: bool) -> None:
    """Raise UserError for what would fail after all the images were read, or would do nothing."""
    if not 0 <= args.max_skipped <= 1:
        raise UserError(f"--max_skipped is {args.max_skipped}; it is a share of the expressions, from 0 to 1")
    held_out = "--held_out_ids" if args.held_out_ids else "--also_held_out" if args.also_held_out else None
    if held_out and not leaves_out:
        raise UserError(
            f"{held_out} leaves images out of a combined training, and {' '.join(args.dataset)} is none that does; "
            f"drop it, or for one data set give it to the training (data.{held_out[2:]})"
        )
    if args.held_out_ids:
        read_image_ids(args.held_out_ids)
    for name in args.also_held_out:
        dataset_spec(name)
        if name not in names and not any((args.output / name).glob("*.parquet")):
            raise UserError(f"--also_held_out {name}: {args.output / name} is not prepared; prepare it first")


def _check_sources(names: Sequence[str], sources: Sequence[str | None], refer_root: Path) -> None:
    """Raise UserError unless every data set's annotations are there, before the first one's images are read."""
    for name, source in zip(names, sources, strict=True):
        dataset_spec(name)
        if source is None:
            refer_paths(refer_root, name)
        else:
            from amltrain.data.refer_hub import check_source  # imports torchvision

            check_source(source)


def _prepare(name: str, source: str | None, args: argparse.Namespace) -> dict[str, Any]:
    if source is None:
        return prepare(name, args.refer_root, args.output, image_root=args.image_root, max_skipped=args.max_skipped)
    from amltrain.data.refer_hub import read_hub_schema  # imports torchvision

    return prepare_files(read_hub_schema(source, name), args.output, args.image_root, max_skipped=args.max_skipped)
