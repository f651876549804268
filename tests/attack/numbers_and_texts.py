"""Configs, flags and sentences."""

import os
import time
from collections.abc import Callable, Iterator
from typing import Any

from PIL import Image

from amltrain.commands.train import read_run
from amltrain.inference.predictor import Predictor
from tests.attack.cases import Case, Place

ALIASES = "a: &a [1, 1, 1, 1, 1, 1, 1, 1, 1]\n" + "".join(
    f"{chr(98 + i)}: &{chr(98 + i)} [{', '.join([f'*{chr(97 + i)}'] * 9)}]\n" for i in range(12)
)
YAML: dict[str, str] = {
    "a bomb of aliases": ALIASES,
    "an anchor in itself": "model: &a {kwargs: {x: *a}}",
    "an anchor in itself, a list": "data: {datasets: &a [*a]}",
    "a Python object": "seed: !!python/object/apply:os.mkdir [executed]",
    "a Python name": "seed: !!python/name:os.system",
    "an unknown tag": "seed: !custom 3",
    "binary": "seed: !!binary aGVsbG8=",
    "nested": "data: " + "[" * 5000 + "]" * 5000,
    "nested objects": "data: " + "{a: " * 3000 + "1" + "}" * 3000,
    "NUL": "seed: 3\0",
    "not UTF-8": "seed: \udcff",
    "a tab": "\tseed: 3",
    "two documents": "seed: 1\n---\nseed: 2",
    "empty": "",
    "a list": "- seed: 3",
    "a text": "seed",
    "a number": "3",
    "null": "null",
    "twice": "seed: 3\nseed: 4",
    "a merge": "x: &x {seed: 3}\n<<: *x",
    "no text as a key": "[1, 2]: 3",
    "null as a key": "? \n: 3",
    "an object as a key": "{a: 1}: 3",
    "unknown": "sead: 3",
    "its own base": "base: [config.yaml]",
    "base outside": "base: [/etc/passwd]",
    "base of a device": "base: [/dev/zero]",
    "base of a number": "base: 3",
    "base of nested": "base: [[a]]",
    "a million keys": "model: {kwargs: {" + ", ".join(f"k{i}: 1" for i in range(20_000)) + "}}",
}
KEYS = ("seed", "optim.lr", "train.max_steps", "data.workers", "preprocess.size", "evaluation.protocol.threshold")
VALUES = (
    "null",
    "-1",
    "1e999",
    ".nan",
    "9" * 400,
    "0x" + "f" * 300,
    "text",
    "[]",
    "{}",
    "'\\0'",
    "true",
    "2:30:00",
    "\ud800",
)
SENTENCES = {
    "100,000 letters": "x" * 100_000,
    "4,000 words": "square " * 4000,
    "100,000 spaces": "a" + " " * 100_000 + "b",
    "NUL": "a\0b",
    "half a surrogate": "red \ud800",
    "control characters": "\x01\x02\x1b[31m",
    "right to left": "\u202eabc\u202d",
    "10,000 combining marks": "a" + "\u0301" * 10_000,
    "emoji": "\U0001f469\u200d\U0001f469\u200d\U0001f467" * 500,
    "entities": "&amp;" * 10_000,
    "special tokens": "[CLS] [MASK] [PAD] [SEP] [UNK]" * 100,
    "only marks": "!?.,;:" * 1000,
    "a path": "../../etc/passwd",
    "a template": "{0} %s ${HOME} `id`",
    "empty": "",
    "spaces": " \t\n",
    "no-break spaces": "\u00a0\u2003",
}  # fmt: skip


def _config(text: str) -> Callable[[Place], Any]:
    def attack(place: Place) -> Any:
        (place.folder / "config.yaml").write_bytes(text.encode("utf-8", "surrogateescape"))
        return read_run(["--config", str(place.folder / "config.yaml")])

    return attack


def _sentence(sentence: str) -> Callable[[Place], Any]:
    def attack(place: Place) -> Any:
        predictor = Predictor.from_pretrained(place.model)
        start = time.monotonic()
        predictor.tokenizer.cut(sentence)
        predictor.tokenizer.unknown(sentence)
        predictor(Image.new("RGB", (40, 30)), [sentence])
        assert time.monotonic() - start < 20

    return attack


def _pipe(place: Place) -> Any:
    os.mkfifo(place.folder / "config.yaml")
    (place.folder / "above.yaml").write_text("base: [config.yaml]")
    return read_run(["--config", str(place.folder / "above.yaml")])


def cases() -> Iterator[Case]:
    harmless = ("a merge", "twice", "binary", "two documents")
    for name, text in YAML.items():
        expected = "decided" if name in harmless else "rejected"
        yield Case("configs", name, expected, _config(text))
    yield Case("configs", "a named pipe as base", "rejected", _pipe)
    for key in KEYS:
        for value in VALUES:
            yield Case("flags", f"{key} {value[:12]!r}", "decided", lambda _, k=key, v=value: read_run([f"--{k}", v]))
            yield Case(
                "flags",
                f"{key}: {value[:12]!r} in a file",
                "decided",
                _config(
                    f"{key.replace('.', ': {')}: {value}{'}' * key.count('.')}".encode("utf-8", "replace").decode()
                ),
            )
    for flag in (
        "--",
        "--=",
        "--config",
        "--config=",
        "--seed",
        "--no.such",
        "--model.kwargs",
        "--data.datasets",
        "\0",
        "x" * 10_000,
    ):
        yield Case("flags", f"{flag[:20]!r} alone", "decided", lambda _, f=flag: read_run([f]))
    for name, sentence in SENTENCES.items():
        expected = (
            "rejected"
            if name in ("empty", "spaces", "no-break spaces")
            else "decided"
            if name == "half a surrogate"
            else "used"
        )
        yield Case("sentences", name, expected, _sentence(sentence))
