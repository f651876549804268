"""Tables of own data, predictions, and files of a run."""

import csv
import io
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from amltrain import run_folder as checkpoints
from amltrain.checkpoints.lock import OutputLock
from amltrain.checkpoints.resume import Progress
from amltrain.data.prepare import prepare_files
from amltrain.data.sources.folder import read_folder
from amltrain.data.sources.table import read_table
from amltrain.errors import UserError
from amltrain.evaluation.prediction_files import find_predictions
from amltrain.paper.grids import read_losses
from amltrain.run_folder import LOCK_FILE, read_log
from tests.attack.cases import DAMAGED, Case, Place, odd
from tests.data.original import HEIGHT, IMAGES, WIDTH

ROW = {
    "image": "COCO_train2014_000000000001.jpg",
    "sentence": "the square",
    "mask": [[5, 5, 25, 5, 25, 25]],
    "split": "train",
}
VALUES = ("null", "true", "-1", "2^70", "NaN", "NUL", "half a surrogate", "100,000 letters", "[]", "{}", "nested")
PROGRESS = Progress(step=3, saved=3, spread=[1, 2, 2], samples=9, seed=1)


def _table(row: dict[str, Any]) -> Callable[[Place], Any]:
    def attack(place: Place) -> Any:
        path = place.folder / "table.jsonl"
        path.write_text(json.dumps(row))
        images = place.root / IMAGES
        return prepare_files(read_table(path, images, "own"), place.folder / "out", images, progress=False)

    return attack


def _file(name: str, content: bytes, read: Callable[[Path], Any]) -> Callable[[Place], Any]:
    def attack(place: Place) -> Any:
        path = place.folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
        return read(path)

    return attack


def _read_table(path: Path) -> Any:
    return read_table(path, path.parent, "own")


def _named(name: str) -> Callable[[Place], Any]:
    return lambda place: read_table(_written(place, ROW), place.root / IMAGES, name)


def _written(place: Place, row: Any) -> Path:
    path = place.folder / "table.jsonl"
    path.write_text(json.dumps(row))
    return path


def _piped(name: str, read: Callable[[Path], Any]) -> Callable[[Place], Any]:
    def attack(place: Place) -> Any:
        os.mkfifo(place.folder / name)
        return read(place.folder / name)

    return attack


def _predicted(row: Any) -> Callable[[Place], Any]:
    """A line of predictions, and its mask as it is scored."""

    def attack(place: Place) -> Any:
        from amltrain.evaluation.prediction_files import _decode

        path = place.folder / "p.jsonl"
        path.write_text(json.dumps(row))
        masks = find_predictions(path, "refcoco", "val")
        for entry in masks.entries.values():
            try:
                _decode(entry.mask)
            except (ValueError, TypeError, KeyError) as error:  # counted by the scorer
                raise UserError(str(error)) from error

    return attack


def _progress(content: dict[str, Any]) -> Callable[[Place], Any]:
    def attack(place: Place) -> Any:
        checkpoint = _checkpoint(place)
        (checkpoint / checkpoints.TRAINER_FILE).write_text(json.dumps(content))
        new = Progress(spread=[1, 2, 2], samples=9, seed=1)
        return new.resumed(checkpoints.load_trainer_state(checkpoint), "step-000003")

    return attack


def _checkpoint(place: Place) -> Path:
    def write(folder: Path) -> None:
        (folder / "model").mkdir()
        (folder / "model" / "model.safetensors").write_bytes(b"x" * 1000)
        (folder / checkpoints.TRAINER_FILE).write_text(json.dumps(PROGRESS.state_dict()))

    (place.folder / "run").mkdir(exist_ok=True)  # a run's folder is made once, by the run
    return checkpoints.write_checkpoint(place.folder / "run", 3, write)


def _spoiled(spoil: Callable[[Path], Any]) -> Callable[[Place], Any]:
    """A damaged newest checkpoint: the one before is used, loudly."""

    def attack(place: Place) -> Any:
        first, run = _checkpoint(place), place.folder / "run"
        newest = run / "step-000006"
        os.rename(first, newest)
        older = _checkpoint(place)
        spoil(newest)
        said: list[str] = []
        assert checkpoints.find_resumable(run, "auto", said.append) == older
        assert said and "damaged" in said[0], said

    return attack


def _manifest(content: bytes) -> Callable[[Place], Any]:
    return _spoiled(lambda path: (path / checkpoints.MANIFEST).write_bytes(content))


def _lock(content: bytes) -> Callable[[Place], Any]:
    def attack(place: Place) -> Any:
        (place.folder / LOCK_FILE).write_bytes(content)
        lock = OutputLock(place.folder)
        lock.acquire()
        lock.release()

    return attack


def _wrong_kind(name: str) -> Callable[[Place], Any]:
    """`last` is a folder of its own."""

    def attack(place: Place) -> Any:
        (place.folder / "run" / name / "x").mkdir(parents=True)
        _checkpoint(place)

    return attack


def cases() -> Iterator[Case]:
    for key in ROW:
        for name, value in odd(VALUES):
            yield Case("tables", f"{key}: {name}", "decided", _table({**ROW, key: value}))
    for key in ("ref_id", "image_id", "category", "box", "no_target", "mask_value", "sentences"):
        for name, value in odd(("null", "true", "2^70", "NaN", "NUL", "[[]]", "nested")):
            yield Case("tables", f"{key}: {name}", "decided", _table({**ROW, key: value}))
    for ending in (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".xyz"):
        for name, content in DAMAGED.items():
            yield Case("tables", f"table{ending}: {name}", "rejected", _file(f"t/table{ending}", content, _read_table))
    for name in ("", "..", "../x", "a/b", "a\0b", "x" * 500, "refcoco", ".hidden", "-x", "\ud800"):
        yield Case("tables", f"named {name[:10]!r}", "rejected", _named(name))
    huge = io.StringIO()
    csv.writer(huge).writerows([["image", "sentence", "mask"], ["x.jpg", "x" * 10**6, "m.png"]])
    yield Case(
        "tables", "a cell of a million letters", "decided", _file("t/table.csv", huge.getvalue().encode(), _read_table)
    )
    yield Case("tables", "a named pipe", "rejected", _piped("table.jsonl", _read_table))
    yield Case("tables", "a folder without files", "rejected", lambda place: read_folder(place.folder, "own"))
    lone = {"sent_id": 1, "size": [HEIGHT, WIDTH], "counts": [HEIGHT * WIDTH]}
    for key in ("sent_id", "size", "counts", "ref_id"):
        for name, value in odd(("null", "2^70", "1e999", "text", "[[]]", "{}", "nested", "half a surrogate")):
            either = key == "ref_id" or (key, name) == ("sent_id", "2^70")
            yield Case(
                "predictions", f"{key}: {name}", "decided" if either else "rejected", _predicted({**lone, key: value})
            )
    for name, content in DAMAGED.items():
        expected = "decided" if name in ("empty", "NUL") else "rejected"
        yield Case(
            "predictions",
            f"file: {name}",
            expected,
            _file("p.jsonl", content, lambda path: find_predictions(path, "refcoco", "val")),
        )
        yield Case(
            "files of a run",
            f"log.jsonl: {name}",
            "decided",
            _file("log.jsonl", content, lambda path: read_log(path.parent)),
        )
        yield Case(
            "files of a run",
            f"log.jsonl, convergence: {name}",
            "rejected",
            _file("log.jsonl", content, lambda path: read_losses(path.parent)),
        )
        yield Case("files of a run", f"manifest.json: {name}", "used", _manifest(content))
        yield Case("files of a run", f"lock: {name}", "used", _lock(content))
    for name, value in odd():
        content = json.dumps({"files": value}).encode()
        yield Case("files of a run", f"manifest files: {name}", "used", _manifest(content))
        if name not in ("0", "true"):
            yield Case(
                "files of a run",
                f"progress step: {name}",
                "rejected",
                _progress({**PROGRESS.state_dict(), "step": value}),
            )
        yield Case(
            "files of a run",
            f"progress spread: {name}",
            "rejected",
            _progress({**PROGRESS.state_dict(), "spread": value}),
        )
        yield Case(
            "files of a run", f"progress unknown: {name}", "rejected", _progress({**PROGRESS.state_dict(), "x": value})
        )
    for name in ("model/model.safetensors", checkpoints.TRAINER_FILE, checkpoints.MANIFEST):
        yield Case(
            "files of a run", f"{name} missing", "used", _spoiled(lambda path, name=name: (path / name).unlink())
        )
        yield Case(
            "files of a run", f"{name} empty", "used", _spoiled(lambda path, name=name: (path / name).write_bytes(b""))
        )
    for name in ("last", "step-000003"):
        yield Case("files of a run", f"{name} is a folder", "decided", _wrong_kind(name))
