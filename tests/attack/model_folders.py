"""Model folders from strangers: every value of every JSON file, damaged files, links."""

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from PIL import Image

from amltrain.config.schema import Preprocess, Protocol
from amltrain.evaluation.results import read_results
from amltrain.hub.model_card import build_model_card
from amltrain.inference.predictor import Predictor
from tests.attack.cases import DAMAGED, Case, Place, changed, odd

FILES = ("config.json", "preprocessor_config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors")
NUMBERS = ("null", "true", "-1", "0", "2^70", "1e999", "NaN", "text", "[]", "nested")
BOMB = {"type": "Sequence", "normalizers": [{"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 50}] * 6}
HARMLESS = {
    ("protocol", "threshold", "true"), ("protocol", "threshold", "0"), ("protocol", "no_target_pixels", "0"),
    ("protocol", "mask_parts", "null"),
}  # fmt: skip


def predict(folder: Path) -> Any:
    """Load and use it: a value that loads must also work."""
    predictor = Predictor.from_pretrained(folder)
    return predictor(Image.new("RGB", (40, 30)), ["the square"])


def _changing(name: str, keys: Sequence[str | int], value: Any) -> Callable[[Place], Any]:
    def attack(place: Place) -> Any:
        folder = place.copy(place.model)
        changed(folder / name, keys, value)
        return predict(folder)

    return attack


def _with(change: Callable[[Path], Any], read: Callable[[Path], Any] = predict) -> Callable[[Place], Any]:
    def attack(place: Place) -> Any:
        folder = place.copy(place.model)
        change(folder)
        return read(folder)

    return attack


def _replaced(name: str, content: bytes) -> Callable[[Place], Any]:
    return _with(lambda folder: (folder / name).write_bytes(content))


def _pipe(name: str) -> Callable[[Path], None]:
    def replace(folder: Path) -> None:
        (folder / name).unlink()
        os.mkfifo(folder / name)

    return replace


def _card(folder: Path) -> Any:
    return str(build_model_card(folder, "user/name", read_results(folder / "results.json")))


def cases() -> Iterator[Case]:
    kind = "model folders"
    for name in FILES:
        for damage, content in DAMAGED.items():
            expected = "decided" if name == "tokenizer_config.json" and damage == "null" else "rejected"
            yield Case(kind, f"{name}: {damage}", expected, _replaced(name, content))
        ignored = "used" if name == "tokenizer_config.json" else "rejected"  # transformers sees no file
        yield Case(kind, f"{name}: a named pipe", ignored, _with(_pipe(name)))
        without = "decided" if name == "tokenizer_config.json" else "rejected"
        yield Case(kind, f"{name}: missing", without, _with(lambda folder, name=name: (folder / name).unlink()))
    for field in fields(Preprocess):
        for name, value in odd(NUMBERS):
            harmless = field.name == "tokenizer" and name == "text"
            expected = "used" if harmless else "rejected"
            yield Case(
                kind, f"{field.name}: {name}", expected, _changing("preprocessor_config.json", [field.name], value)
            )
    for field in fields(Protocol):
        for name, value in odd(NUMBERS):
            expected = "decided" if ("protocol", field.name, name) in HARMLESS else "rejected"
            if name == "null":
                expected = "decided"  # an older version's "unset"
            yield Case(
                kind,
                f"protocol.{field.name}: {name}",
                "decided" if field.name == "no_target_pixels" else expected,
                _changing("config.json", ["protocol", field.name], value),
            )
    for key in ("model", "kwargs", "protocol"):
        for name, value in odd(("null", "2^70", "text", "[]", "nested", "half a surrogate", "100,000 letters")):
            yield Case(kind, f"{key}: {name}", "rejected", _changing("config.json", [key], value))
    for name, value in odd(("-1", "0", "2^70", "1e999", "text", "[]")):
        yield Case(
            kind,
            f"kwargs.window_size: {name}",
            "rejected",
            _changing("config.json", ["kwargs"], {"window_size": value}),
        )
    for key in ("model_max_length", "tokenizer_class", "pad_token", "cls_token", "extra_special_tokens"):
        for name, value in odd(("null", "-1", "2^70", "text", "[[]]", "half a surrogate", "nested")):
            yield Case(kind, f"{key}: {name}", "decided", _changing("tokenizer_config.json", [key], value))
    yield Case(kind, "a normaliser that grows", "rejected", _changing("tokenizer.json", ["normalizer"], BOMB))
    yield Case(
        kind, "a vocabulary of negative ids", "decided", _changing("tokenizer.json", ["model", "vocab"], {"a": -1})
    )
    for keys in (["model"], ["model", "vocab"], ["normalizer"], ["added_tokens"], ["post_processor"]):
        for name, value in odd(("2^70", "text", "nested", "half a surrogate")):
            yield Case(
                kind, f"tokenizer.json {'.'.join(keys)}: {name}", "decided", _changing("tokenizer.json", keys, value)
            )
    for name in ("results.json", "training.json", "conversion.json"):
        for damage, content in DAMAGED.items():

            def spoil(folder: Path, name: str = name, content: bytes = content) -> None:
                (folder / "results.json").write_text('{"results": []}')
                (folder / name).write_bytes(content)

            yield Case("cards and results", f"{name}: {damage}", "rejected", _with(spoil, _card))
    row = {"dataset": "refcoco", "split": "val", "counts": {}, "protocol": {}, "provenance": {}, "metrics_percent": {}}
    for key in row:
        for name, value in odd(("null", "2^70", "text", "[[]]", "nested", "1e999")):

            def write(folder: Path, key: str = key, value: Any = value) -> None:
                import json

                (folder / "results.json").write_text(json.dumps({"results": [{**row, key: value}]}))

            harmless = key in ("dataset", "split") and name == "text"
            yield Case(
                "cards and results",
                f"results {key}: {name}",
                "decided" if harmless else "rejected",
                _with(write, _card),
            )
