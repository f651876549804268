"""Segment what sentences refer to in images, with a trained model.

    amltrain predict --checkpoint runs/quickstart/best --image street.jpg --sentence "red car on the left" "the dog"
    amltrain predict --checkpoint runs/quickstart/best --image photos/ "more/**/*.png" --sentence "the person"

Writes into the output folder:

    masks/NAME.png       0 or 255, at the image's own size
    overlays/NAME.png    the mask drawn over the image
    predictions.jsonl    one row per image and sentence: the mask as RLE, its area, a probability and its meaning

Rows and pictures of earlier calls stay; the same image and sentence replaces its own. An image that cannot be read is
counted and named, and the others are still segmented.
"""

import argparse
from collections.abc import Sequence

from amltrain.errors import one_line_errors
from amltrain.run_folder import find_model_folder


def build_parser() -> argparse.ArgumentParser:
    """Build the command line's parser."""
    parser = argparse.ArgumentParser(
        prog="amltrain predict",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--checkpoint", required=True, help="model folder, checkpoint folder or Hub repository")
    parser.add_argument("--revision", help="branch, tag or commit of a Hub repository")
    parser.add_argument(
        "--image", nargs="+", required=True, help="image files, folders, or patterns in quotes (** = all subfolders)"
    )
    parser.add_argument("--sentence", nargs="+", default=[], help="one or several sentences, each in quotes")
    parser.add_argument("--sentences_file", help="text file with one sentence per line")
    parser.add_argument("--output", default="predictions", help="folder to write to (default: predictions)")
    parser.add_argument(
        "--write",
        nargs="*",
        choices=["masks", "overlays"],
        default=["masks", "overlays"],
        help="pictures to write besides predictions.jsonl",
    )
    parser.add_argument(
        "--overlay_side",
        type=int,
        default=1600,
        help="longest side of an overlay in pixels; 0 = the image's own (default: %(default)s)",
    )
    parser.add_argument("--device", help="cpu, cuda, cuda:1, mps (default: a GPU if there is one)")
    parser.add_argument(
        "--mixed_precision", choices=["no", "fp16", "bf16"], default="no", help="half precision; no is fp32 (default)"
    )
    parser.add_argument(
        "--threshold", type=float, help="probability of a pixel of the mask (default: the model's, 0.5)"
    )
    parser.add_argument("--batch_size", type=int, default=8, help="sentences per forward pass (default: 8)")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    args = build_parser().parse_args(arguments)
    with one_line_errors():
        find_model_folder(args.checkpoint, args.revision)  # before the imports
        from amltrain.inference import predict as predict_images  # imports torch

        predict_images.run(predict_images.PredictOptions(**vars(args)))
