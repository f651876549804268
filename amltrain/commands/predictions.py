"""The folder that `amltrain predict` writes: pictures with names of their own, and predictions.jsonl."""

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from PIL import Image

from amltrain.errors import UserError

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
            rows = [json.loads(line) for line in self.rows_file.read_text(encoding="utf-8").splitlines()]
            return [row for row in rows if all(isinstance(row[key], str) for key in ("image", "sentence", "name"))]
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise UserError(
                f"{self.rows_file} was not written by this program or is damaged; choose another --output"
            ) from error

    def _open(self, kept: Sequence[dict[str, Any]]) -> TextIO:
        temporary = self.rows_file.with_name(f".{ROWS_FILE}.{os.getpid()}")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            temporary.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
            temporary.replace(self.rows_file)
            return self.rows_file.open("a", encoding="utf-8")
        except OSError as error:
            raise UserError(
                f"cannot write to {self.folder}: {error.strerror or error}; choose another --output"
            ) from error

    def __enter__(self) -> "PredictionFolder":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
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
        try:
            path.parent.mkdir(exist_ok=True)
            picture.save(path, compress_level=1)
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror or error}") from error
        return str(path)

    def add(self, row: dict[str, Any]) -> None:
        """Append a row with `image` and `sentence`. Raises UserError if it cannot be written."""
        named = {"name": self.name(row["image"], row["sentence"]), "checkpoint": self.checkpoint}
        try:
            self._file.write(json.dumps(row | named) + "\n")
            self._file.flush()
        except OSError as error:
            raise UserError(f"cannot write {self.rows_file}: {error.strerror or error}") from error


def _plain(text: str) -> str:
    """Letters, digits and hyphens, cut so that the UTF-8 name fits any file system."""
    plain = re.sub(r"\W+", "-", text).strip("-")
    return plain.encode()[:_LONGEST].decode(errors="ignore").strip("-")
