"""Predicted masks as files: written by an evaluation, read to score anybody's predictions.

Two forms, each for one split; REF and SENT are the data set's ref_id and sent_id:

    masks   a folder with one picture per sample, `REF_SENT.png` (or `SENT.png` where sent_ids are unique); 0 is
            background, one other value the referent. `no_target.json` may list the names predicted to have no target.
    rle     JSON lines, one sample each: {"ref_id": .., "sent_id": .., "size": [height, width], "counts": "..",
            "no_target": false}; size and counts are COCO's compressed run lengths. They may lie in "mask" or
            "segmentation" too; ref_id and no_target may be missing; lines of another "dataset" or "split" are skipped.

What an evaluation writes has a manifest beside it (`NAME.manifest.json`, in a folder `manifest.json`): which model made
the masks, from which data, and the SHA-256 of every file, which is compared when they are read.

A mask has the size of its image. For a protocol that scores at network size it may have that size instead.
"""

import hashlib
import json
import os
import shutil
import socket
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple, TextIO

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from PIL import Image
from pycocotools import mask as coco

from amltrain.config.schema import Protocol
from amltrain.data.images import FileFault, decode_file
from amltrain.data.segmentation import decode_mask
from amltrain.distributed import on_main_process
from amltrain.errors import UserError, first_line, shared_error
from amltrain.evaluation.masks import Masks, network_size
from amltrain.files import load_json, sha256, write_text, writing
from amltrain.records import Batch
from amltrain.run_folder import MANIFEST

SUFFIXES = (".png", ".bmp", ".gif", ".tif", ".tiff", ".jpg", ".jpeg")
NO_TARGET_FILE = "no_target.json"
Form = Literal["masks", "rle"]
SampleKey = tuple[int | None, int]
"""(ref_id, sent_id); ref_id None where the file names the sentence alone."""


class Entry(NamedTuple):
    """One prediction: where it is, its mask (a picture's path or run lengths), and its no-target flag if given."""

    place: str
    mask: Path | dict[str, Any]
    no_target: bool | None


class FileMasks:
    """Predictions of one split, looked up by sample.

    faults collects, in one phrase each, the samples whose masks cannot be scored.
    """

    def __init__(
        self, source: Path, entries: Sequence[tuple[SampleKey, Entry]], manifest: dict[str, Any] | None = None
    ) -> None:
        """manifest: as `PredictionWriter` wrote it; None = predictions from elsewhere, which have none."""
        self.source = source
        self.facts: dict[str, Any] = (manifest or {}).get("facts", {})
        self.hashes: dict[str, str] = (manifest or {}).get("files", {})
        self.entries = dict(entries)
        self.doubled = sorted(_name(key) for key, count in Counter(key for key, _ in entries).items() if count > 1)
        self.has_flags = any(entry.no_target is not None for entry in self.entries.values())
        self.by_sentence = all(ref is None for ref, _ in self.entries)
        self.faults: list[str] = []

    def check_ids(self, dataset: Any) -> None:
        """Raise UserError, with counts and examples, unless every sample has exactly one prediction."""
        contents = split_contents(dataset)
        if contents and self.facts.get("data_fingerprint", contents) != contents:
            raise UserError(f"{self.source} was predicted from other data of that name; predict again")
        wanted = [self._key(dataset.info(i)) for i in range(len(dataset))]
        faults = []
        if len(set(wanted)) < len(wanted):
            fix = "give every prediction its ref_id" if self.by_sentence else "rename them in the data"
            faults.append(f"{len(wanted) - len(set(wanted))} samples share their ids with another; {fix}")
        faults += _counted("missing", [_name(key) for key in wanted if key not in self.entries], len(wanted))
        faults += _counted("there twice", self.doubled, len(wanted))
        self.raise_faults(faults)

    def raise_faults(self, faults: Sequence[str]) -> None:
        """Raise UserError if there are any; nothing is scored then."""
        if faults:
            shown = "; ".join(faults[:5]) + (f"; and {len(faults) - 5} more" if len(faults) > 5 else "")
            raise UserError(f"{self.source}: {shown}. Nothing was scored; correct the predictions.")

    def masks(self, host: Batch, dataset: Any, protocol: Protocol) -> Masks:
        """The masks of a batch in the protocol's frame; a faulty one is noted in `faults` and empty."""
        found, flags = [], []
        for row, sample_id in enumerate(host.sample_id.tolist()):
            entry = self.entries[self._key(dataset.info(sample_id))]
            original = (int(host.geometry[row, 0]), int(host.geometry[row, 1]))
            expected = original if protocol.frame == "original" else network_size(host)
            found.append(torch.from_numpy(self._mask(entry, original, expected, dataset)))
            flags.append(bool(entry.no_target))
        return Masks(found, torch.tensor(flags) if self.has_flags else None, torch.ones(len(found), dtype=torch.bool))

    def _mask(self, entry: Entry, original: tuple[int, int], expected: tuple[int, int], dataset: Any) -> np.ndarray:
        try:
            if isinstance(entry.mask, Path):
                mask = _read_picture(entry.mask, self.hashes.get(entry.mask.name))
            else:
                mask = _decode(entry.mask)
        except (OSError, ValueError, TypeError, KeyError, FileFault) as error:
            self.faults.append(f"{entry.place}: {first_line(error)}")
            return np.zeros(expected, bool)
        if mask.shape == expected:
            return mask
        if mask.shape == original:  # to the network's size, as the ground truth gets there
            return dataset.transform.target(mask.astype(np.uint8)).numpy() > 127
        sizes = [original, *([] if expected == original else [expected])]
        needed = " or ".join(f"{height} x {width}" for height, width in sizes)
        self.faults.append(f"{entry.place} is {mask.shape[0]} x {mask.shape[1]}, not {needed} (height x width)")
        return np.zeros(expected, bool)

    def _key(self, info: Any) -> SampleKey:
        return (None if self.by_sentence else info.ref_id, info.sent_id)


def find_predictions(source: str | Path, dataset: str, split: str) -> FileMasks:
    """Predictions of one split: a JSON-lines file, a folder of masks, or a folder that holds either per split.

    In a folder, `DATASET-SPLIT.jsonl`, `DATASET-SPLIT/` or one name that starts so and continues with `-` (as
    evaluations write them) is taken first. Raises UserError where nothing or several things fit.
    """
    source = Path(source)
    if source.is_file():
        manifest = _read_manifest(source)
        if manifest is not None and sha256(source) != manifest["files"].get(source.name):
            raise UserError(f"{source} has changed since it was written; predict again, or remove {_beside(source)}")
        return FileMasks(source, _read_lines(source, dataset, split), manifest)
    if not source.is_dir():
        raise UserError(f"there are no predictions at {source}; give a folder of masks or a .jsonl file")
    name = f"{dataset}-{split}"
    own = [p for p in (source / f"{name}.jsonl", source / name) if p.exists()] or sorted(
        p for p in source.glob(f"{name}-*") if p.is_dir() or p.suffix == ".jsonl"
    )
    if len(own) > 1:
        raise UserError(f"{source} has several predictions of {name}: {', '.join(p.name for p in own)}; name one")
    if own:
        return find_predictions(own[0], dataset, split) if own[0].is_file() else _read_folder(own[0])
    return _read_folder(source)


def _read_folder(folder: Path) -> FileMasks:
    paths = sorted(p for p in folder.iterdir() if p.suffix.lower() in SUFFIXES and p.is_file())
    if not paths:
        raise UserError(f"{folder} holds no masks (REF_SENT.png) and no predictions of this split")
    manifest = _read_manifest(folder)
    for name, wanted in (manifest["files"] if manifest else {}).items():
        path = folder / name
        if not path.is_file() or (name == NO_TARGET_FILE and sha256(path) != wanted):  # masks: when they are read
            what = "has changed since it was written" if path.is_file() else "is missing"
            raise UserError(f"{path} {what}; predict again, or remove {_beside(folder).name}")
    if manifest is not None and (more := [p.name for p in paths if p.name not in manifest["files"]]):
        raise UserError(f"{folder / more[0]} is not in {MANIFEST}; remove it, or predict again")
    names = _read_json(folder / NO_TARGET_FILE) if (folder / NO_TARGET_FILE).exists() else None
    entries = []
    for path in paths:
        parts = path.stem.split("_")
        if len(parts) > 2 or not all(part.isdigit() for part in parts):
            raise UserError(f"{path} is not named REF_SENT.png or SENT.png (the data set's ref_id and sent_id)")
        key = (int(parts[0]) if len(parts) == 2 else None, int(parts[-1]))
        entries.append((key, Entry(path.name, path, None if names is None else path.stem in names)))
    return FileMasks(folder, entries, manifest)


def split_contents(dataset: Any) -> str:
    """The fingerprint of a split's contents, whatever part of it is scored; "" where it is not known."""
    return "".join(opened.fingerprint for opened in getattr(dataset, "splits", ()))


def _beside(predictions: Path) -> Path:
    """Where the manifest of a folder of masks, or of a file of run lengths, lies."""
    return predictions / MANIFEST if predictions.is_dir() else predictions.with_suffix(f".{MANIFEST}")


def _read_manifest(predictions: Path) -> dict[str, Any] | None:
    path = _beside(predictions)
    if not path.exists():
        return None
    content = load_json(path)
    right = isinstance(content, dict) and all(isinstance(content.get(key), dict) for key in ("facts", "files"))
    if not right:
        raise UserError(f"{path} is not a manifest of predictions; predict again")
    return content


def _read_json(path: Path) -> list[str]:
    try:
        names = json.loads(path.read_text(encoding="utf-8"))
        return [str(name).removesuffix(".png") for name in names]
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{path} must hold a JSON list of names, e.g. ['12_34'] ({first_line(error)})") from error


def _read_lines(path: Path, dataset: str, split: str) -> list[tuple[SampleKey, Entry]]:
    entries = []
    with path.open(encoding="utf-8", errors="replace") as file:
        listed = file.read(1) == "["  # COCO's results: a list of predictions
        file.seek(0)
        lines = [file.read()] if listed else file
        for number, line in enumerate(_listed(lines, path) if listed else lines, 1):
            if not line.strip():
                continue
            place = f"entry {number}" if listed else f"line {number}"
            try:
                row = json.loads(line)
                if not isinstance(row, dict):
                    raise TypeError(f"it is a {type(row).__name__}")
                if row.get("dataset", dataset) != dataset or row.get("split", split) != split:
                    continue
                ref = row.get("ref_id")
                key = (None if ref is None else int(ref), int(row["sent_id"]))
                mask = row.get("mask") or row.get("segmentation") or {name: row[name] for name in ("size", "counts")}
                no_target = row.get("no_target")
            except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
                needed = "sent_id, size and counts"
                raise UserError(
                    f"{path}, {place}: not a prediction ({first_line(error)}); it needs {needed}"
                ) from error
            entries.append((key, Entry(place, mask, no_target)))
    return entries


def _listed(texts: Iterable[str], path: Path) -> list[str]:
    """The entries of a JSON list, each as JSON again."""
    try:
        return [json.dumps(entry) for text in texts for entry in json.loads(text)]
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not a JSON list of predictions ({first_line(error)})") from error


def _read_picture(path: Path, wanted: str | None) -> np.ndarray:
    content = path.read_bytes()
    if wanted is not None and hashlib.sha256(content).hexdigest() != wanted:
        raise ValueError("it has changed since it was written")
    picture = decode_file(content)
    pixels = np.asarray(picture if picture.mode in ("1", "L", "P", "I", "I;16") else picture.convert("L"))
    values = np.unique(pixels)
    if len(values) > 2 or (len(values) == 2 and values[0] != 0):
        raise ValueError(f"it has the values {', '.join(map(str, values[:4]))}, ...; a mask has 0 and one other")
    return pixels > 0


def _decode(rle: dict[str, Any]) -> np.ndarray:
    if not isinstance(rle, dict):
        raise ValueError("it is not run lengths (size, counts); polygons do not tell the size of their picture")
    return decode_mask(rle).astype(bool)


def _counted(what: str, names: Sequence[str], total: int) -> list[str]:
    if not names:
        return []
    return [f"{len(names)} of {total} samples are {what} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"]


def _name(key: SampleKey) -> str:
    return f"sentence {key[1]}" if key[0] is None else f"ref {key[0]} sentence {key[1]}"


class PredictionWriter:
    """Writes every predicted mask of a split in one of the two forms, in the frame that was scored.

    Every process writes its share; `finish` joins them.
    """

    def __init__(self, folder: Path, form: Form, accelerator: Accelerator) -> None:
        """folder: where the finished predictions will lie."""
        self.form, self.accelerator = form, accelerator
        self.lines: TextIO | None = None
        self.fault: UserError | None = None

        def begin() -> str:
            """Make a folder that no other evaluation writes to, without what an interrupted one has left."""
            name = f".writing-{form}-{socket.gethostname()}-{os.getpid()}"
            with writing(folder / name):
                shutil.rmtree(folder / name, ignore_errors=True)
                (folder / name).mkdir(parents=True)
            return name

        self.temporary = folder / on_main_process(accelerator, begin)
        with self._faults_kept():
            self.lines = (self.temporary / f"{accelerator.process_index}.jsonl").open("w", encoding="utf-8")

    @contextmanager
    def _faults_kept(self) -> Iterator[None]:
        """Keep the first error of this process for `finish`: raised here it would leave the others waiting."""
        try:
            with writing(self.temporary):
                yield
        except UserError as error:
            if self.accelerator.num_processes == 1:
                raise
            self.fault = self.fault or error

    def add(self, sample_ids: Iterable[int], masks: Masks, dataset: Any) -> None:
        """Write one batch; waits for the device. Raises UserError; on several processes `finish` does so."""
        with self._faults_kept():
            if self.fault is None:
                self._add(sample_ids, masks, dataset)

    def _add(self, sample_ids: Iterable[int], masks: Masks, dataset: Any) -> None:
        assert self.lines is not None
        flags = [None] * len(masks.masks) if masks.no_target is None else masks.no_target.tolist()
        for sample_id, mask, flag in zip(sample_ids, masks.masks, flags, strict=True):
            info, pixels = dataset.info(sample_id), mask.cpu().numpy()
            row: dict[str, Any] = info._asdict() | ({} if flag is None else {"no_target": flag})
            if self.form == "masks":
                Image.fromarray(pixels.astype(np.uint8) * 255).save(
                    self.temporary / f"{info.ref_id}_{info.sent_id}.png"
                )
            else:
                rle = coco.encode(np.asfortranarray(pixels.astype(np.uint8)))
                row |= {"size": list(pixels.shape), "counts": rle["counts"].decode()}
            self.lines.write(json.dumps({"sample_id": sample_id} | row) + "\n")

    def finish(self, target: Path, facts: Mapping[str, Any] | None = None) -> Path:
        """Join what the processes wrote under this name (plus .jsonl for run lengths), and return the path.

        Older predictions of that name are replaced. facts: which model made them, from which data. Raises UserError.
        """
        target = target.with_name(f"{target.name}.jsonl") if self.form == "rle" else target
        with self._faults_kept():
            if self.lines is not None:
                self.lines.close()
        faults = [fault for fault in gather_object([self.fault and str(self.fault)]) if fault]
        if faults:
            raise shared_error(faults[0])

        def write() -> None:
            with writing(target):
                _beside(target).unlink(missing_ok=True)  # never beside files that it does not describe
                self._join(target)
                files = [target] if target.is_file() else sorted(p for p in target.iterdir() if p.is_file())
                manifest = {"facts": dict(facts or {}), "files": {path.name: sha256(path) for path in files}}
                write_text(_beside(target), json.dumps(manifest, indent=1))

        on_main_process(self.accelerator, write)
        return target

    def _join(self, target: Path) -> None:
        rows: dict[int, dict[str, Any]] = {}
        for path in self.temporary.glob("*.jsonl"):
            with path.open(encoding="utf-8") as file:
                rows |= {row.pop("sample_id"): row for row in map(json.loads, file)}
            path.unlink()
        if self.form == "rle":
            joined = self.temporary / "joined"
            with joined.open("w", encoding="utf-8") as file:
                file.writelines(json.dumps(rows[i]) + "\n" for i in sorted(rows))
            os.replace(joined, target)
            shutil.rmtree(self.temporary)
            return
        named = [f"{row['ref_id']}_{row['sent_id']}" for row in rows.values() if row.get("no_target")]
        if any("no_target" in row for row in rows.values()):
            (self.temporary / NO_TARGET_FILE).write_text(json.dumps(sorted(named)), encoding="utf-8")
        if target.exists():
            shutil.rmtree(target)
        self.temporary.rename(target)
