"""Segment what sentences mean in an image, with a trained model.

    amltrain predict --checkpoint runs/quickstart/last/model --image street.jpg \
        --sentence "red car on the left" "the dog" --output predictions/

Writes for every sentence a mask (PNG, 0/255, at the image's own size) and an overlay to look at, and prints how sure
the model is and how much of the image the mask covers.
"""

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from amltrain.commands.device import choose_device
from amltrain.data.text import SentenceTokenizer
from amltrain.errors import UserError, one_line_errors
from amltrain.evaluation.visualize import overlay
from amltrain.predictor import Predictor, Segmentation, read_image


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="amltrain predict", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", required=True, help="model folder, checkpoint folder or Hub repository")
    parser.add_argument("--image", required=True, help="image file")
    parser.add_argument("--sentence", nargs="+", required=True, help="one or several sentences, each in quotes")
    parser.add_argument("--output", default="predictions", help="folder for the pictures (default: predictions)")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, mps (default: a GPU where there is one)")
    return parser


def predict(
    checkpoint: str, image: str, sentences: Sequence[str], output: str | Path, device: str | None = None
) -> list[Segmentation]:
    """Segment, write the pictures and print a line for each sentence."""
    picture = read_image(image)
    predictor = Predictor.from_pretrained(checkpoint, choose_device(device))
    for sentence in sentences:
        for line in unread(predictor.tokenizer, sentence):
            print(f"warning: {line}", file=sys.stderr)
    found = predictor(picture, sentences)
    try:
        Path(output).mkdir(parents=True, exist_ok=True)
        for name, sentence, segmentation in zip(_names(image, sentences), sentences, found, strict=True):
            said = describe(segmentation)
            Image.fromarray(segmentation.mask).convert("L").save(Path(output) / f"{name}.png")
            overlay(picture, segmentation.mask, sentence, said).save(Path(output) / f"{name}-overlay.png")
            print(f'"{sentence}": {said} -> {Path(output) / name}.png')
    except OSError as error:
        raise UserError(f"cannot write to {output}: {error.strerror or error}") from error
    return found


def unread(tokenizer: SentenceTokenizer, sentence: str) -> list[str]:
    """A line for each reason why the model does not read a sentence as it was typed."""
    lines = []
    if cut := tokenizer.cut(sentence):
        lines.append(f'"{sentence}" is cut after {tokenizer.max_tokens} tokens; not read: {cut}')
    unknown = tokenizer.unknown(sentence)
    if 2 * len(unknown) > len(sentence.split()):
        lines.append(f'"{sentence}": the model\'s vocabulary lacks most of it: {" ".join(unknown)}')
    return lines


def describe(segmentation: Segmentation) -> str:
    """One phrase: how sure, and how much of the image."""
    if segmentation.nothing:
        return f"nothing in this image (probability {segmentation.confidence:.2f})"
    return f"probability {segmentation.confidence:.2f}, {100 * segmentation.mask.mean():.1f} % of the image"


def _names(image: str, sentences: Sequence[str]) -> list[str]:
    """A file name for each sentence: readable, and no two alike."""
    names: list[str] = []
    for sentence in sentences:
        words = re.sub(r"\W+", "-", sentence.lower()).strip("-")[:48]
        name = f"{Path(image).stem}-{words}"
        names.append(name if name not in names else f"{name}-{len(names) + 1}")
    return names


def main(arguments: Sequence[str] | None = None) -> None:
    args = build_parser().parse_args(arguments)
    with one_line_errors():
        predict(args.checkpoint, args.image, args.sentence, args.output, args.device)
