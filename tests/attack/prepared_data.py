"""Prepared Parquet files: nulls, wrong types, masks that do not fit, flipped bits, hostile manifests."""

import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from amltrain.data.catalog import describe, find_spec, read_manifest
from amltrain.data.dataset import OpenSplit, ReferDataset
from amltrain.data.rows import SHOWN_FEATURES, hash_file, open_rows
from amltrain.data.text import SentenceTokenizer
from amltrain.data.transforms import ImageTransform
from amltrain.errors import UserError
from tests.attack.cases import DAMAGED, Case, Place, odd
from tests.data.original import HEIGHT, WIDTH


def samples(prepared: Path) -> list[Any]:
    """Every sample of val, as training reads it."""
    rows = open_rows(str(prepared), "refcoco", "val", streaming=True)
    tokenizer = SentenceTokenizer.train_wordpiece(["the square"], 8)
    dataset = ReferDataset(
        [OpenSplit("refcoco", "val", rows, None)], ImageTransform(32, "square", "imagenet"), tokenizer
    )
    return [dataset[i] for i in range(len(dataset))]


def _rewritten(
    change: Callable[[list[dict[str, Any]]], Any], schema: pa.Schema | None = None
) -> Callable[[Place], Any]:
    """Change the rows of val and make the manifest fit, as an attacker would."""

    def attack(place: Place) -> Any:
        prepared = place.copy(place.prepared)
        path = next((prepared / "refcoco").glob("val-*"))
        rows = pq.read_table(path).to_pylist()
        change(rows)
        pq.write_table(pa.Table.from_pylist(rows, schema=schema), path)
        manifest = json.loads((prepared / "refcoco" / "manifest.json").read_text())
        manifest["files"][path.name] = hash_file(path)._asdict()
        (prepared / "refcoco" / "manifest.json").write_text(json.dumps(manifest))
        return samples(prepared)

    return attack


def _set(keys: tuple[Any, ...], value: Any) -> Callable[[list[dict[str, Any]]], None]:
    def change(rows: list[dict[str, Any]]) -> None:
        content: Any = rows[0]
        for key in keys[:-1]:
            content = content[key]
        content[keys[-1]] = value

    return change


def _flipped(place: Place, number: int) -> Any:
    """One bit of any byte: an error, or exactly the same samples; which of them, is the format's."""
    whole = samples(place.prepared)
    prepared = place.copy(place.prepared)
    path = next((prepared / "refcoco").glob("val-*"))
    content = bytearray(path.read_bytes())
    place_of_bit = int.from_bytes(hashlib.sha256(str(number).encode()).digest()[:8], "big")
    content[place_of_bit // 8 % len(content)] ^= 1 << place_of_bit % 8
    path.write_bytes(content)
    try:
        found = samples(prepared)
    except UserError:
        return
    for one, other in zip(found, whole, strict=True):
        for a, b in zip(one, other, strict=True):
            assert (a is None and b is None) or np.array_equal(a, b), "changed silently"


def _manifest(content: bytes) -> Callable[[Place], Any]:
    def attack(place: Place) -> Any:
        prepared = place.copy(place.prepared)
        (prepared / "refcoco" / "manifest.json").write_bytes(content)
        return read_manifest(prepared / "refcoco")

    return attack


def _own_manifest(key: str, value: Any) -> Callable[[Place], Any]:
    def attack(place: Place) -> Any:
        prepared = place.copy(place.prepared)
        (prepared / "refcoco").rename(prepared / "own")
        path = prepared / "own" / "manifest.json"
        manifest = json.loads(path.read_text())
        manifest["spec"][key] = value
        path.write_text(json.dumps(manifest))
        return find_spec("own", str(prepared))

    return attack


FULL = HEIGHT * WIDTH
SIZE = ("referents", 0, "mask", "size")
COUNTS = ("referents", 0, "mask", "counts")
WRONG: dict[str, tuple[tuple[Any, ...], Any]] = {
    "image_id null": (("image_id",), None),
    "file_name null": (("file_name",), None),
    "height null": (("height",), None),
    "width null": (("width",), None),
    "height of another image": (("height",), HEIGHT + 1),
    "height 0": (("height",), 0),
    "height -1": (("height",), -1),
    "height 2^31 - 1": (("height",), 2**31 - 1),
    "image null": (("image",), None),
    "image without bytes": (("image",), {"bytes": None, "path": "/etc/passwd"}),
    "image is text": (("image",), {"bytes": b"<html>", "path": "x.jpg"}),
    "referents null": (("referents",), None),
    "ref_id null": (("referents", 0, "ref_id"), None),
    "ann_ids null": (("referents", 0, "ann_ids"), None),
    "no_target null": (("referents", 0, "no_target"), None),
    "mask null": (("referents", 0, "mask"), None),
    "size null": (SIZE, None),
    "size of one number": (SIZE, [HEIGHT]),
    "size turned": (SIZE, [WIDTH, HEIGHT]),
    "size 0": (SIZE, [0, 0]),
    "size of 10^9": (SIZE, [10**9, 10**9]),
    "counts null": (COUNTS, None),
    "counts empty": (COUNTS, ""),
    "counts of letters": (COUNTS, "garbage!"),
    "counts that never end": (COUNTS, "o" * 10_000),
    "counts too long": (COUNTS, "_" * 5 + "0"),
    "counts of 35 bits": (COUNTS, "PPPPPPP0"),
    "sentences null": (("referents", 0, "sentences"), None),
    "no sentence": (("referents", 0, "sentences"), []),
    "sentence null": (("referents", 0, "sentences", 0, "sent"), None),
    "raw null": (("referents", 0, "sentences", 0, "raw"), None),
    "sent_id null": (("referents", 0, "sentences", 0, "sent_id"), None),
}


def cases() -> Iterator[Case]:
    kind = "prepared data"
    for name, (keys, value) in WRONG.items():
        yield Case(kind, name, "rejected", _rewritten(_set(keys, value), SHOWN_FEATURES.arrow_schema))
    yield Case(
        kind,
        "a sentence of 100,000 letters",
        "used",
        _rewritten(_set(("referents", 0, "sentences", 0, "sent"), "x" * 10**5), SHOWN_FEATURES.arrow_schema),
    )
    for column in ("image_id", "file_name", "height", "referents"):
        for name, value in (("text", "x"), ("number", 0.5), ("list", [1]), ("object", {"a": 1})):
            harmless = column == "file_name" and name == "text"

            def replace(rows: list[dict[str, Any]], column: str = column, value: Any = value) -> None:
                for row in rows:
                    row[column] = value

            yield Case(
                kind,
                f"{column} of type {name}",
                "decided" if harmless or column == "file_name" else "rejected",
                _rewritten(replace),
            )
    for column in ("image_id", "image", "referents"):

        def drop(rows: list[dict[str, Any]], column: str = column) -> None:
            for row in rows:
                del row[column]

        yield Case(kind, f"no column {column}", "rejected", _rewritten(drop))
    for number in range(40):
        yield Case(kind, f"flipped bit {number}", "used", lambda place, number=number: _flipped(place, number))
    for name, content in DAMAGED.items():
        yield Case(kind, f"manifest: {name}", "rejected", _manifest(content))
    for key in ("splits", "split_by", "generalised", "metrics"):
        for name, value in odd(("null", "-1", "text", "[[]]", "nested")):
            yield Case(kind, f"manifest spec.{key}: {name}", "decided", _own_manifest(key, value))
    yield Case(
        kind, "manifest described", "used", lambda place: describe(read_manifest(place.prepared / "refcoco") or {})
    )
