"""Load a model and segment images: what `amltrain predict` does after its arguments are read."""

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from pycocotools import mask as coco
from tqdm.auto import tqdm

from amltrain.commands.device import choose_device
from amltrain.commands.images import find_images
from amltrain.commands.predictions import PredictionFolder
from amltrain.data.text import SentenceTokenizer
from amltrain.errors import UserError
from amltrain.evaluation.visualize import OVERLAY_SIDE, overlay
from amltrain.predictor import INSIDE, Predictor, Segmentation, read_image

WRITES = ("masks", "overlays")


def predict(
    predictor: Predictor,
    images: Sequence[str],
    sentences: Sequence[str],
    output: PredictionFolder,
    *,
    write: Sequence[str] = WRITES,
    overlay_side: int | None = OVERLAY_SIDE,
) -> list[str]:
    """Segment every sentence in every image and write the results; return one message for each unreadable image."""
    failures: list[str] = []
    bar = tqdm(images, desc="predict", unit="image", leave=False, disable=True if len(images) < 2 else None)
    for path in bar:
        try:
            image = read_image(path)
        except UserError as error:
            failures.append(str(error))
            tqdm.write(f"skipped: {error}", file=sys.stderr)
            continue
        for sentence, segmentation in zip(sentences, predictor(image, sentences), strict=True):
            files = _draw(image, sentence, segmentation, output, path, write, overlay_side)
            output.add(row(path, sentence, segmentation) | files)
            if len(images) == 1:
                print(f'"{sentence}": {describe(segmentation)}' + (f" -> {files['mask']}" if "mask" in files else ""))
    return failures


def _draw(
    image: Image.Image,
    sentence: str,
    segmentation: Segmentation,
    output: PredictionFolder,
    path: str,
    write: Sequence[str],
    side: int | None,
) -> dict[str, str]:
    """Write the requested pictures; return their paths for the row."""
    files: dict[str, str] = {}
    if "masks" in write:
        files["mask"] = output.save(Image.fromarray(segmentation.mask).convert("L"), "masks", path, sentence)
    if "overlays" in write:
        picture = overlay(image, segmentation.mask, sentence, describe(segmentation), side)
        files["overlay"] = output.save(picture, "overlays", path, sentence)
    return files


def row(image: str, sentence: str, segmentation: Segmentation) -> dict[str, Any]:
    """Return one line of predictions.jsonl; the mask is COCO's compressed RLE."""
    rle = coco.encode(np.asfortranarray(segmentation.mask, dtype=np.uint8))
    return {
        "image": image,
        "sentence": sentence,
        "size": list(segmentation.mask.shape),
        "rle": {"size": [int(n) for n in rle["size"]], "counts": rle["counts"].decode("ascii")},
        "area": int(np.count_nonzero(segmentation.mask)),
        "nothing": bool(segmentation.nothing),
        "confidence": round(segmentation.confidence, 6),
        "confidence_of": segmentation.confidence_of,
    }


def unread(tokenizer: SentenceTokenizer, sentence: str) -> Iterator[str]:
    """Give a line for each reason why the model does not read a sentence as it was typed."""
    if cut := tokenizer.cut(sentence):
        yield f'"{sentence}" is cut after {tokenizer.max_tokens} tokens; not read: {cut}'
    if unknown := tokenizer.unknown(sentence):
        yield f'"{sentence}": not in the model\'s vocabulary: {" ".join(unknown)}'


def describe(segmentation: Segmentation) -> str:
    """Describe in one phrase what was found, its share of the image, and the meaning of the probability."""
    sure = f"{segmentation.confidence_of} {segmentation.confidence:.2f}"
    if segmentation.confidence_of == INSIDE:
        share = 100 * segmentation.mask.mean()
        return f"{share:.1f} % of the image, {sure}" if share >= 0.05 else f"under 0.1 % of the image, {sure}"
    return f"nothing found, {sure}" if segmentation.nothing else f"no pixel passes the threshold, {sure}"


def read_sentences(sentences: Sequence[str], file: str | None) -> list[str]:
    """Join the sentences of the command line and of a file, each once, in order. Raises UserError if there is none."""
    lines: list[str] = []
    if file is not None:
        try:
            lines = [line.strip() for line in Path(file).read_text(encoding="utf-8").splitlines() if line.strip()]
        except (OSError, ValueError) as error:
            raise UserError(f"--sentences_file {file} cannot be read ({error}); give a UTF-8 text file") from error
    found = list(dict.fromkeys([*sentences, *lines]))
    if not found:
        if file is not None:
            raise UserError(f"--sentences_file {file} has no sentence; write one on each line")
        raise UserError("there is no sentence; give --sentence or --sentences_file")
    if not all(sentence.strip() for sentence in found):
        raise UserError("a sentence is empty; say what to look for")
    return found


def run(args: argparse.Namespace) -> None:
    """Check the arguments, load the model, and predict."""
    if args.batch_size < 1 or args.overlay_side < 0:
        raise UserError("--batch_size must be 1 or more, and --overlay_side 0 or more")
    sentences = read_sentences(args.sentence, args.sentences_file)
    images = find_images(args.image)
    if len(images) == 1:
        read_image(images[0])  # before the model is loaded
    predictor = Predictor.from_pretrained(
        args.checkpoint,
        choose_device(args.device),
        revision=args.revision,
        batch_size=args.batch_size,
        precision=args.mixed_precision,
    )
    for sentence in sentences:
        for line in unread(predictor.tokenizer, sentence):
            print(f"warning: {line}", file=sys.stderr)
    with PredictionFolder(args.output, images, sentences, args.checkpoint) as output:
        failures = predict(
            predictor, images, sentences, output, write=args.write, overlay_side=args.overlay_side or None
        )
    if len(failures) == len(images):
        raise UserError(f"none of the {len(images)} images could be read; the first: {failures[0]}")
    if len(images) > 1:
        read, written = len(images) - len(failures), ", ".join([str(output.rows_file), *args.write])
        print(f"{read} images, {len(sentences)} sentences -> {written}")
    if failures:
        print(f"{len(failures)} of {len(images)} images could not be read (named above)", file=sys.stderr)
