"""The --image arguments of a command line: files, folders and patterns.

The folder that `amltrain predict` writes: pictures with names of their own, and predictions.jsonl.

Load a model and segment images: what `amltrain predict` does after its arguments are read.
"""

import json
import os
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np
from PIL import Image
from pycocotools import mask as coco
from tqdm.auto import tqdm

from amltrain.data.text import SentenceTokenizer
from amltrain.environment import choose_device
from amltrain.errors import UserError
from amltrain.evaluation.draw import OVERLAY_SIDE, overlay
from amltrain.files import new_file, writing
from amltrain.inference.predictor import INSIDE, NO_TARGET, Precision, Predictor, Segmentation, find_images, read_image

ROWS_FILE = "predictions.jsonl"
_LONGEST = 80
"""Letters of a file name that come from the image's name, and again from the sentence."""


class PredictionFolder:
    """Context manager over an output folder: adds rows as they come, and keeps those of earlier calls.

    rows_file is the path of predictions.jsonl. It is complete after every `add`, also when the program is killed.
    """

    def __init__(
        self, folder: str | Path, images: Sequence[str], sentences: Sequence[str], checkpoint: str = ""
    ) -> None:
        """Rows of the folder for any pair of `images` and `sentences` will be replaced.

        Raises UserError if the folder cannot be written, or holds a predictions.jsonl that cannot be read.
        """
        self.folder, self.checkpoint = Path(folder), checkpoint
        self.rows_file = self.folder / ROWS_FILE
        pairs = {(image, sentence) for image in images for sentence in sentences}
        earlier = self._earlier()
        kept = [row for row in earlier if (row["image"], row["sentence"]) not in pairs]
        self.names = {(row["image"], row["sentence"]): row["name"] for row in earlier}
        self._taken = {name.lower() for name in self.names.values()}
        self._file = self._open(kept)

    def _earlier(self) -> list[dict[str, Any]]:
        if not self.rows_file.exists():
            return []
        try:
            lines = self.rows_file.read_bytes().split(b"\n")[:-1]  # the last has no end where a kill cut it off
            rows = [json.loads(line) for line in lines]
            return [row for row in rows if all(isinstance(row[key], str) for key in ("image", "sentence", "name"))]
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise UserError(
                f"{self.rows_file} was not written by this program or is damaged; choose another --output"
            ) from error

    def _open(self, kept: Sequence[dict[str, Any]]) -> BinaryIO:
        with new_file(self.rows_file) as temporary:
            temporary.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
        with writing(self.rows_file):
            return self.rows_file.open("ab", buffering=0)

    def __enter__(self) -> "PredictionFolder":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with writing(self.rows_file) if error is None else suppress(OSError):
            self._file.close()

    def name(self, image: str, sentence: str) -> str:
        """Return the file name, without ending, of an image and a sentence: readable, and different for every pair."""
        key = (image, sentence)
        if key not in self.names:
            base = f"{_plain(Path(image).stem)}-{_plain(sentence.lower())}".strip("-") or "prediction"
            name, count = base, 2
            while name.lower() in self._taken:  # some file systems do not tell A from a
                name, count = f"{base}-{count}", count + 1
            self.names[key] = name
            self._taken.add(name.lower())
        return self.names[key]

    def save(self, picture: Image.Image, kind: str, image: str, sentence: str) -> str:
        """Write a PNG into the subfolder `kind` and return its path. Raises UserError if it cannot be written."""
        path = self.folder / kind / f"{self.name(image, sentence)}.png"
        with new_file(path) as temporary:
            picture.save(temporary, "PNG", compress_level=1)
        return str(path)

    def add(self, row: dict[str, Any]) -> None:
        """Append a row with `image` and `sentence`. Raises UserError if it cannot be written."""
        named = {"name": self.name(row["image"], row["sentence"]), "checkpoint": self.checkpoint}
        line = (json.dumps(row | named) + "\n").encode()
        with writing(self.rows_file):
            before = os.fstat(self._file.fileno()).st_size
            try:
                while line:  # a disk that gets full takes a part
                    line = line[self._file.write(line) :]
            except OSError:
                with suppress(OSError):
                    self._file.truncate(before)
                raise


def _plain(text: str) -> str:
    """Letters, digits and hyphens, cut so that the UTF-8 name fits any file system."""
    plain = re.sub(r"\W+", "-", text).strip("-")
    return plain.encode()[:_LONGEST].decode(errors="ignore").strip("-")


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
    if segmentation.confidence_of == NO_TARGET:
        return f"nothing found: {sure}"
    highest = float(segmentation.probability.max())
    if highest > segmentation.threshold:
        return "nothing found: fewer pixels pass the threshold than the protocol asks for"
    return f"nothing found: the highest probability is {highest:.2f}, the threshold {segmentation.threshold:g}"


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


@dataclass(kw_only=True)
class PredictOptions:
    """What to segment; fields as the flags of `amltrain predict`, with the same defaults."""

    checkpoint: str
    image: Sequence[str]
    sentence: Sequence[str] = ()
    sentences_file: str | None = None
    revision: str | None = None
    output: str = "predictions"
    write: Sequence[str] = ("masks", "overlays")
    overlay_side: int = 1600
    device: str | None = None
    mixed_precision: Precision = "no"
    batch_size: int = 8
    threshold: float | None = None


def run(options: PredictOptions) -> None:
    """Check the arguments, load the model, and predict."""
    if options.batch_size < 1 or options.overlay_side < 0:
        raise UserError("--batch_size must be 1 or more, and --overlay_side 0 or more")
    sentences = read_sentences(options.sentence, options.sentences_file)
    images = find_images(options.image)
    if len(images) == 1:
        read_image(images[0])  # before the model is loaded
    predictor = Predictor.from_pretrained(
        options.checkpoint,
        choose_device(options.device),
        revision=options.revision,
        batch_size=options.batch_size,
        precision=options.mixed_precision,
        threshold=options.threshold,
    )
    for sentence in sentences:
        for line in unread(predictor.tokenizer, sentence):
            print(f"warning: {line}", file=sys.stderr)
    with PredictionFolder(options.output, images, sentences, options.checkpoint) as output:
        failures = predict(
            predictor, images, sentences, output, write=options.write, overlay_side=options.overlay_side or None
        )
    if len(failures) == len(images):
        raise UserError(f"none of the {len(images)} images could be read; the first: {failures[0]}")
    if len(images) > 1:
        read, written = len(images) - len(failures), ", ".join([str(output.rows_file), *options.write])
        print(f"{read} images, {len(sentences)} sentences -> {written}")
    if failures:
        print(f"{len(failures)} of {len(images)} images could not be read (named above)", file=sys.stderr)
