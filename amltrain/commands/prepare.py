"""Turn annotations and images into Parquet that `datasets` reads.

    amltrain data prepare my_export --name mine
    amltrain data prepare --table my.csv --images photos --name mine
    amltrain data prepare --folder my_files --name mine
    amltrain data prepare --hf user/data --columns image=photo sentence=text mask=mask --name mine
    amltrain data prepare --dataset combined --refer_root data/refer --image_root data/train2014
    amltrain data prepare --dataset refcoco --hub jxu124/refcoco --image_root data/train2014

Own data come from a table (image, sentence, mask), a COCO-style JSON, a folder of files, a data set of the Hub, or the
export of an annotation tool: LabelMe, CVAT, Label Studio, YOLO, COCO (Roboflow), Pascal VOC, FiftyOne. A plain path is
looked at, and its form is found out.
Published data sets come from their original files: `<refer_root>/refcoco/refs(unc).p` and `instances.json` (gRefCOCO:
`grefs(unc).json`), or the same annotations from the Hub. Every image is decoded once, and `<output>/<name>/*.parquet`
is written with a manifest of counts and `rows.jpg`, some rows to look at. Several data sets also get the list of images
that a combined training leaves out. docs/data.md shows every form of mask and where to find the files.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from amltrain.commands.describe import add_options
from amltrain.config.schema import COMBINED
from amltrain.data.catalog import DATASETS, FORM_NAMES
from amltrain.errors import UserError, one_line_errors


def build_parser() -> argparse.ArgumentParser:
    """The command line, whose help is this file's docstring."""
    parser = argparse.ArgumentParser(
        prog="amltrain data prepare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    own = parser.add_argument_group("own data")
    own.add_argument("path", type=Path, nargs="?", help="annotations in any form that is known; the form is found out")
    own.add_argument("--form", help=f"form of the annotations at the path: {', '.join(FORM_NAMES)}")
    own.add_argument("--table", type=Path, help="JSONL, CSV, TSV, Parquet, or COCO-style JSON")
    own.add_argument("--folder", type=Path, help="folder of X.jpg, X_mask.png and X.txt, or images/, masks/, texts/")
    own.add_argument("--hf", metavar="ID", help="data set of the Hub, or a folder that `load_dataset` reads")
    own.add_argument("--name", help="name of the data set, for data.datasets and --dataset later")
    own.add_argument("--images", type=Path, help="folder that the table's image paths start from (default: its own)")
    own.add_argument("--masks", type=Path, help="folder that mask paths start from (default: --images)")
    own.add_argument(
        "--columns", nargs="+", default=[], metavar="COLUMN=NAME", help="columns that have other names: image=photo"
    )
    own.add_argument("--describe", action="store_true", help="write sentences for objects that have none")
    add_options(own)
    own.add_argument("--encoding", help="of text files that are not UTF-8: cp1252, gbk, shift_jis, utf-16-le, ...")
    own.add_argument(
        "--exif",
        choices=("auto", "stored", "upright"),
        default="auto",
        help="which pixels the annotations of turned photographs fit, where no size tells (default: stop and ask)",
    )
    own.add_argument("--follow_links", action="store_true", help="read pictures through links that leave their folder")
    own.add_argument("--label_field", help="FiftyOne: the field of the samples that has the objects")
    own.add_argument("--mask_threshold", type=int, help="mask pixels of at least this value are the object")
    own.add_argument(
        "--split_shares",
        nargs="+",
        metavar="SPLIT=SHARE",
        help="how images without a split are shared out (default train=0.8 val=0.1 test=0.1)",
    )
    own.add_argument("--seed", type=int, default=0, help="of that choice")
    published = parser.add_argument_group("published data sets")
    published.add_argument(
        "--dataset",
        nargs="+",
        default=[],
        metavar="NAME",
        help=f"{', '.join(DATASETS.names())}; or combined = {' '.join(COMBINED)}, from whose training every image is "
        f"dropped that any of them evaluates on; or combined-unfiltered, which keeps them",
    )
    published.add_argument("--refer_root", type=Path, help="folder in the original layout")
    published.add_argument(
        "--hub",
        nargs="+",
        metavar="ID",
        help="instead of refer_root: for every data set a Hub id like jxu124/refcoco, or a folder with its files",
    )
    published.add_argument("--image_root", type=Path, help="COCO train2014; default: looked for under refer_root")
    published.add_argument(
        "--also_held_out", nargs="*", default=[], metavar="NAME", help="prepared data sets whose val and test count too"
    )
    published.add_argument("--held_out_ids", type=Path, help="JSON list of further image ids to leave out")
    parser.add_argument("--output", type=Path, default=Path("prepared"), help="where the prepared data goes")
    parser.add_argument(
        "--max_skipped", type=float, default=0.001, help="share of expressions that may be unusable (default 0.001)"
    )
    parser.add_argument("--workers", type=int, help="processes (default: one per core); the output is the same")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    args = build_parser().parse_args(argv)
    with one_line_errors():
        for name in ("path", "table", "folder", "images", "masks", "refer_root", "image_root"):
            path = getattr(args, name)
            if path is not None and not path.exists():
                raise UserError(f"{'' if name == 'path' else f'--{name}: '}there is no {path}")
        from amltrain.commands import prepare_data  # imports torch and datasets

        prepare_data.run(args)
