"""Draw training samples as they are, and after augmentations with their default options.

    amltrain data look --dataset mine --augment flip scale_jitter --output augmented.jpg

A row of the picture is a sample: first as it is, then in the first epochs. The mask is outlined; the sentence below is
the one that the model will read.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from amltrain.errors import UserError, one_line_errors

EPOCHS = 3
"""Augmented versions of each sample."""


def build_parser() -> argparse.ArgumentParser:
    """The command line, whose help is this file's docstring."""
    parser = argparse.ArgumentParser(
        prog="amltrain data look", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dataset", required=True, help="name of the prepared data set")
    parser.add_argument("--prepared", default="prepared", help="folder of the prepared data, or a Hub data set id")
    parser.add_argument("--split", default="train")
    parser.add_argument("--augment", nargs="*", default=[], metavar="NAME", help="augmentations, in order")
    parser.add_argument("--rows", type=int, default=8, help="how many samples (default 8)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("samples.jpg"), help="the picture to write")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    args = build_parser().parse_args(argv)
    with one_line_errors():
        if args.rows < 1:
            raise UserError(f"--rows is {args.rows}; it should be at least 1")
        from amltrain.data.augment import build_augmentations
        from amltrain.data.dataset import OpenSplit, ReferDataset
        from amltrain.data.row_sheet import grid, sample_tile
        from amltrain.data.rows import open_rows
        from amltrain.data.text import SentenceTokenizer
        from amltrain.data.transforms import ImageTransform
        from amltrain.records import Draw

        opened = OpenSplit(args.dataset, args.split, open_rows(args.prepared, args.dataset, args.split))
        augmentations = build_augmentations(args.augment)
        words = SentenceTokenizer.train_wordpiece(["a"], 8)  # sentences are shown, not read by a model
        dataset = ReferDataset([opened], ImageTransform(448), words, sentence_field="raw", seed=args.seed)
        step = max(1, len(dataset) // args.rows)
        tiles = []
        for index in range(0, min(len(dataset), step * args.rows), step):
            plain = dataset.raw(Draw(0, index))
            tiles.append(sample_tile(plain.image, plain.mask, plain.sentence))
            for epoch in range(EPOCHS if augmentations else 0):
                sample = dataset.raw(Draw(epoch, index))
                for augmentation in augmentations:
                    sample = augmentation(sample, Draw(epoch, index), dataset)
                nothing = " (nothing)" if sample.no_target else ""
                tiles.append(sample_tile(sample.image, sample.mask, f"epoch {epoch}: {sample.sentence}{nothing}"))
        try:
            grid(tiles, 1 + EPOCHS if augmentations else 4).save(args.output, quality=90)
        except (OSError, ValueError) as error:
            raise UserError(f"could not write {args.output} ({error}); name a .jpg or .png") from error
        print(f"wrote {args.output}")
