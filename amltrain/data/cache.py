"""Presized images: the network input of every row, computed once, and read from a memory-mapped file.

    prepared/refcoco/presized/train-448-square-union-pil/
        images.npy       [rows, 3, S, S] uint8
        sums.npy         [rows] uint64, the checksum of every image
        values.npy ...   masks at S x S as runs of equal values; one file per field of `Runs`
        presized.json    what they were made from and how, and the SHA-256 of every file but the images

The tensors are exactly those of the uncached path with the same settings. Decoding and resizing are most of a sample's
time, so reading is about ten times faster. The folder is used only while the prepared data set is the one that it was
made from; one process writes it, while others wait, to a temporary folder that is renamed atomically. Every loader
process maps the same file, so its pages are held once. A process checks an image when it first reads it.
"""

import json
import os
import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from amltrain.data.images import Decoder, decode_image
from amltrain.data.rows import Rows
from amltrain.data.segmentation import MaskParts, choose_rle, decode_rle
from amltrain.data.transforms import ImageTransform
from amltrain.errors import NO_ROOM, UserError, cure
from amltrain.files import flush_tree, locked, sha256

FORMAT = 2
FOLDER = "presized"
MANIFEST = "presized.json"
_IMAGES = "images.npy"
_SUMS = "sums"
_WAITING = 64
"""Images that are transformed at a time while a cache is written."""


class Runs(NamedTuple):
    """Many [S, S] uint8 maps as runs of equal values: run i has `values[i]` from pixel `starts[i]` on.

    first_run     [maps + 1] int64, where each map's runs begin
    first_target  [rows + 1] int64, where each row's maps begin
    """

    values: NDArray[np.uint8]
    starts: NDArray[np.int32]
    first_run: NDArray[np.int64]
    first_target: NDArray[np.int64]


class PresizedImages:
    """Network input of one split, by row of its table."""

    def __init__(self, folder: str | Path) -> None:
        """folder: as `write_presized` left it. Raises UserError if its files are not those that it wrote."""
        self.folder = Path(folder)
        try:
            self.manifest = json.loads((self.folder / MANIFEST).read_text(encoding="utf-8"))
            for name, wanted in self.manifest["files"].items():
                if sha256(self.folder / name) != wanted:
                    raise ValueError(f"{name} has changed since it was written")
            self._images = np.load(self.folder / _IMAGES, mmap_mode="r")
            self._sums = np.load(self.folder / f"{_SUMS}.npy")
            self._runs = Runs(*(np.load(self.folder / f"{name}.npy", mmap_mode="r") for name in Runs._fields))
            if self._images.dtype != np.uint8 or len(self._images) != len(self._sums):
                raise ValueError(f"{_IMAGES} is not the one that was written")
        except (OSError, ValueError, KeyError, TypeError, AttributeError, EOFError, RecursionError) as error:
            raise self._damaged(str(error)) from error
        self._checked = np.zeros(len(self._images), bool)

    def _damaged(self, why: str) -> UserError:
        return UserError(
            f"{self.folder} is damaged ({why}); write it again with amltrain data presize, or set data.presized false"
        )

    def __len__(self) -> int:
        return len(self._images)

    def image(self, row: int) -> Tensor:
        """Image of a row, [3, S, S] uint8."""
        image = np.array(self._images[row])
        if not self._checked[row]:
            if checksum(image) != self._sums[row]:
                raise self._damaged(f"image {row} of {_IMAGES} has changed since it was written")
            self._checked[row] = True
        return torch.from_numpy(image)

    def target(self, row: int, referent: int) -> Tensor:
        """Target of one referent of a row, [S, S] uint8 coverage in 1/255."""
        number = int(self._runs.first_target[row]) + referent
        runs = slice(int(self._runs.first_run[number]), int(self._runs.first_run[number + 1]))
        side = self._images.shape[-1]
        lengths = np.diff(self._runs.starts[runs], append=side * side)
        return torch.from_numpy(np.repeat(self._runs.values[runs], lengths).reshape(side, side))

    def __getstate__(self) -> dict[str, Any]:
        return {"folder": self.folder, "manifest": self.manifest}  # another process maps the file itself

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["folder"])  # type: ignore[misc]  # of this class, which has no subclass
        if self.manifest != state["manifest"]:
            raise UserError(f"{self.folder} was written again while this run was starting; start it again")


def checksum(image: NDArray[np.uint8]) -> int:
    """The sum of an image's bytes as whole numbers of 64 bits: any flipped bit changes it, and it costs little."""
    flat = image.reshape(-1)
    whole = len(flat) // 8 * 8
    words = int(flat[:whole].view(np.uint64).sum(dtype=np.uint64)) if whole else 0
    return (words + int.from_bytes(flat[whole:].tobytes(), "little") * 3) % 2**64


def presized_folder(
    prepared: str | Path, dataset: str, split: str, transform: ImageTransform, mask_parts: MaskParts, decoder: Decoder
) -> Path:
    """Folder of the presized images of one split with these settings."""
    resize = transform.resize if transform.resize == "square" else f"{transform.resize}-{transform.normalization}"
    return Path(prepared) / dataset / FOLDER / f"{split}-{transform.size}-{resize}-{mask_parts}-{decoder}"


def write_presized(
    prepared: str | Path,
    dataset: str,
    split: str,
    rows: Rows,
    transform: ImageTransform,
    *,
    mask_parts: MaskParts = "union",
    decoder: Decoder = "pil",
    workers: int | None = None,
    progress: bool = True,
) -> Path:
    """Write the presized images of one split; returns their folder. One that is there and up to date is kept.

    prepared: local folder with the prepared data. rows: of this split. mask_parts: the rule of the masks that training
    or evaluation will ask for. workers: threads; None = one per core.
    Raises UserError for an image that cannot be decoded, and when the disk is too small.
    """
    final = presized_folder(prepared, dataset, split, transform, mask_parts, decoder)
    source = describe_source(prepared, dataset, split)
    if _is_current(final, source) and _is_sound(final):
        return final
    try:
        with locked(final):
            # another process may have written it meanwhile; a damaged one is written again
            if not (_is_current(final, source) and _is_sound(final)):
                _write(final, source, rows, transform, mask_parts, decoder, f"{dataset}/{split}", workers, progress)
    except OSError as error:
        raise UserError(f"could not write {final} ({error.strerror or error}); {cure(error)}") from error
    return final


def _write(
    final: Path,
    source: dict[str, Any],
    rows: Rows,
    transform: ImageTransform,
    mask_parts: MaskParts,
    decoder: Decoder,
    place: str,
    workers: int | None,
    progress: bool,
) -> None:
    """Write the presized images of one split to a temporary folder, and rename it."""
    side = transform.size
    needed = len(rows) * 3 * side * side
    partial = final.with_name(f".{final.name}.{os.getpid()}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        free = shutil.disk_usage(partial).free
        if needed > free:
            raise UserError(f"{final} needs {needed / 2**30:.1f} GiB and the disk has {free / 2**30:.1f} GiB free")
        images = np.lib.format.open_memmap(
            partial / _IMAGES, mode="w+", dtype=np.uint8, shape=(len(rows), 3, side, side)
        )
        _reserve(partial / _IMAGES)
        runs = _fill(images, rows, transform, mask_parts, decoder, place, workers, progress)
        sums = np.array([checksum(image) for image in images], np.uint64)
        images.flush()
        del images
        for name, values in {**runs._asdict(), _SUMS: sums}.items():
            np.save(partial / f"{name}.npy", values)
        hashes = {f"{name}.npy": sha256(partial / f"{name}.npy") for name in (*Runs._fields, _SUMS)}
        settings = {"format": FORMAT, "source": source, "mask_parts": mask_parts, "decoder": decoder, "files": hashes}
        settings |= {"size": side, "resize": transform.resize, "normalization": transform.normalization}
        (partial / MANIFEST).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        flush_tree(partial)  # a power failure must not leave a manifest beside images that are still zeros
        old = final.with_name(f".{final.name}.{os.getpid()}.old")
        if final.exists():
            final.replace(old)
        partial.replace(final)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _reserve(path: Path) -> None:
    """Give a sparse file its space now: a disk that fills up under a mapped file ends the process with SIGBUS."""
    if not hasattr(os, "posix_fallocate"):  # macOS and Windows
        return
    with path.open("r+b") as file:
        try:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
        except OSError as error:
            if error.errno in NO_ROOM:
                raise  # other answers: the file system cannot reserve


def _is_sound(folder: Path) -> bool:
    """Whether every image and every run is as it was written; reads all of it."""
    try:
        presized = PresizedImages(folder)
        for row in range(len(presized)):
            presized.image(row)
    except UserError:
        return False
    return True


def open_presized(
    prepared: str | Path,
    dataset: str,
    split: str,
    transform: ImageTransform,
    *,
    mask_parts: MaskParts = "union",
    decoder: Decoder = "pil",
) -> PresizedImages | None:
    """Open the presized images of one split; None if there are none, or the data set was prepared again since."""
    folder = presized_folder(prepared, dataset, split, transform, mask_parts, decoder)
    if not _is_current(folder, describe_source(prepared, dataset, split)):
        return None
    return PresizedImages(folder)


def describe_source(prepared: str | Path, dataset: str, split: str) -> dict[str, Any]:
    """Identify a prepared split: its manifest, and the names and sizes of its Parquet files."""
    folder = Path(prepared) / dataset
    manifest = folder / "manifest.json"
    return {
        "manifest": json.loads(manifest.read_text(encoding="utf-8")) if manifest.is_file() else None,
        "files": [[path.name, path.stat().st_size] for path in sorted(folder.glob(f"{split}-*.parquet"))],
    }


def _is_current(folder: Path, source: dict[str, Any]) -> bool:
    try:
        written = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(written, dict) and written.get("format") == FORMAT and written.get("source") == source


def _fill(
    images: NDArray[np.uint8],
    rows: Rows,
    transform: ImageTransform,
    mask_parts: MaskParts,
    decoder: Decoder,
    place: str,
    workers: int | None,
    progress: bool,
) -> Runs:
    """Transform every row into `images`; returns its targets."""
    columns = rows.columns

    def convert(row: int) -> list[tuple[NDArray[np.uint8], NDArray[np.int32]]]:
        size = columns.column("height")[row].as_py(), columns.column("width")[row].as_py()
        name = f"image {columns.column('file_name')[row]} (row {row}) of {place}"
        images[row] = transform.pixels(decode_image(rows.image_bytes(row), name, size, decoder)).numpy()
        referents = columns.column("referents")[row].as_py()
        return [encode_runs(transform.target(decode_rle(choose_rle(r, mask_parts))).numpy()) for r in referents]

    maps: list[tuple[NDArray[np.uint8], NDArray[np.int32]]] = []
    first_target = [0]
    bar = tqdm(total=len(rows), desc=f"presize {place}", unit="image", leave=False, disable=None if progress else True)
    with ThreadPoolExecutor(workers or os.cpu_count()) as pool, bar:
        for start in range(0, len(rows), _WAITING):  # bounded: results wait in memory until their turn
            for found in pool.map(convert, range(start, min(start + _WAITING, len(rows)))):
                maps += found
                first_target.append(len(maps))
                bar.update()
    return _join(maps, first_target)


def encode_runs(values: NDArray[np.uint8]) -> tuple[NDArray[np.uint8], NDArray[np.int32]]:
    """Turn a map [S, S] into runs of equal values in row-major order: values [R] uint8, first pixels [R] int32."""
    flat = values.reshape(-1)
    starts = np.concatenate([[0], np.flatnonzero(flat[1:] != flat[:-1]) + 1]).astype(np.int32)
    return flat[starts], starts


def _join(maps: Sequence[tuple[NDArray[np.uint8], NDArray[np.int32]]], first_target: list[int]) -> Runs:
    lengths = [len(values) for values, _ in maps]
    return Runs(
        np.concatenate([np.empty(0, np.uint8), *(values for values, _ in maps)]),
        np.concatenate([np.empty(0, np.int32), *(starts for _, starts in maps)]),
        np.cumsum([0, *lengths], dtype=np.int64),
        np.array(first_target, np.int64),
    )
