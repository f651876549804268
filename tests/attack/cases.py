"""What a case of the attack is, and the shared files that cases spoil copies of."""

import json
import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from amltrain.data.prepare import prepare
from amltrain.data.text import SentenceTokenizer
from amltrain.hub.model_folder import save_pretrained
from amltrain.models.registry import create_model, model_info
from tests.data.original import Original

Expected = Literal["rejected", "used", "decided"]
"""rejected: a UserError of one line. used: no error. decided: as decided.csv says, with the value that was read."""


class Place(NamedTuple):
    """Where a case works.

    folder: empty and its own. model, root, prepared: a model folder, original files and what was prepared from them;
    read only, see `copy`. marker: a folder that executed code makes. secret: a file that nothing may read.
    """

    folder: Path
    model: Path
    root: Path
    prepared: Path
    marker: Path
    secret: Path

    def copy(self, source: Path) -> Path:
        """A copy to spoil."""
        target = self.folder / source.name
        shutil.copytree(source, target)
        return target


class Case(NamedTuple):
    """One hostile input. attack: gives it to a reader, and asserts what must hold of what the reader returns."""

    category: str
    name: str
    expected: Expected
    attack: Callable[[Place], Any]


ODD_VALUES: dict[str, Any] = {
    "null": None,
    "true": True,
    "-1": -1,
    "0": 0,
    "2^70": 2**70,
    "1e999": float("inf"),
    "NaN": float("nan"),
    "0.5": 0.5,
    "text": "x",
    "NUL": "a\0b",
    "half a surrogate": "\ud800",
    "100,000 letters": "x" * 100_000,
    "[]": [],
    "[[]]": [[]],
    "{}": {},
    "nested": json.loads("[" * 200 + "]" * 200),
}
DAMAGED: dict[str, bytes] = {
    "empty": b"",
    "NUL": b"\0" * 100,
    "brackets": b"[" * 100_000,
    "braces": b'{"a":' * 100_000,
    "digits": b"9" * 10_000,
    "not UTF-8": b'{"a": "\xff\xfe"}',
    "a list": b"[1, 2]",
    "a number": b"7",
    "null": b"null",
    "cut": b'{"a": [1, 2',
    "HTML": b"<html>404</html>",
}


def odd(names: Iterable[str] | None = None) -> list[tuple[str, Any]]:
    return [(name, ODD_VALUES[name]) for name in (names or ODD_VALUES)]


def build(folder: Path) -> tuple[Path, Path, Path]:
    """A model folder, original files, prepared data."""
    info = model_info("caris_tiny")
    tokenizer = SentenceTokenizer.train_wordpiece(["the square", "left thing"], 12)
    model = create_model("caris_tiny")
    save_pretrained(
        folder / "model",
        name="caris_tiny",
        kwargs={},
        state_dict=model.state_dict(),
        preprocess=info.preprocess,
        protocol=info.protocol,
        tokenizer=tokenizer,
    )
    root = Original(folder / "root", per_split=2).write().root
    prepare("refcoco", root, folder / "prepared", progress=False)
    return folder / "model", root, folder / "prepared"


def changed(path: Path, keys: Sequence[str | int], value: Any) -> None:
    """Replace one value of a JSON file."""
    content = json.loads(path.read_text())
    inside = content
    for key in keys[:-1]:
        inside = inside[key]
    inside[keys[-1]] = value
    path.write_text(json.dumps(content))
