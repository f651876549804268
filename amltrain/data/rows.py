"""The prepared form: one row per image, its referents nested, in Parquet files that notice damage.

Every page has a checksum, which readers verify; the manifest keeps each file's SHA-256 and that of its footer.

Where samples come from: rows of the prepared Parquet files, in any order.

MappedRows    a memory-mapped copy of the files, which `datasets` keeps in its cache
StreamedRows  the files themselves, on a disk or the Hub: one row group is read at a time, no copy is made

A stream of `datasets` only goes forward, so resuming in mid-epoch would read everything before, and every process would
draw other samples. Parquet keeps its rows in groups that can be read alone: a sampler that stays within a few of them
at a time (see `EpochSampler`) gets the same samples with the same numbers as from the copy, from any place on.
"""

import errno
import hashlib
import json
import os
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from textwrap import shorten
from typing import Any, NamedTuple, Protocol

import datasets
import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from datasets import Dataset, Features, Image, IterableDataset, Value
from datasets import Sequence as ListOf
from datasets.exceptions import DatasetGenerationError, DatasetsError
from tqdm.auto import tqdm

from amltrain.data.catalog import check_split, find_manifest
from amltrain.errors import NO_LOCKS, UserError, cure, first_line
from amltrain.files import sha256

ROWS_PER_GROUP = 64
SHARD_BYTES = 512 * 2**20
_RLE = {"size": ListOf(Value("int32")), "counts": Value("string")}


def _features(image: Image) -> Features:
    return Features(
        {
            "image_id": Value("int64"),
            "file_name": Value("string"),
            "height": Value("int32"),
            "width": Value("int32"),
            "image": image,
            "referents": [
                {
                    "ref_id": Value("int64"),
                    "ann_ids": ListOf(Value("int64")),
                    "category": Value("string"),
                    "bbox": ListOf(Value("float32")),  # x, y, width, height in pixels; of all annotations together
                    "no_target": Value("bool"),
                    "mask": _RLE,
                    "mask_exclusive": _RLE,  # null unless components of the object overlap
                    "sentences": [{"sent_id": Value("int64"), "sent": Value("string"), "raw": Value("string")}],
                }
            ],
        }
    )


FEATURES = _features(Image(decode=False))
"""As training reads rows: the image is the file's own bytes, decoded once, where a sample is made."""
SHOWN_FEATURES = _features(Image())
"""As the files describe themselves, so that `load_dataset` and the Hub's viewer show pictures."""


def row_digest(row: dict[str, Any]) -> bytes:
    """The SHA-256 of what a row holds: its picture's bytes, its ids and its referents; not where it lies."""
    content = hashlib.sha256(row["image"]["bytes"]).hexdigest()
    kept = {key: row[key] for key in ("image_id", "height", "width", "referents")}
    return hashlib.sha256(f"{content} {json.dumps(kept, sort_keys=True)}".encode()).digest()


class ShardWriter:
    """Rows of a split -> Parquet shards of about SHARD_BYTES in row groups of ROWS_PER_GROUP."""

    def __init__(self, folder: Path, split: str) -> None:
        self._folder, self._split = folder, split
        self._shards: list[Path] = []
        self._writer: pq.ParquetWriter | None = None
        self._pending: list[dict[str, Any]] = []

    def add(self, row: dict[str, Any]) -> None:
        """Take a row of FEATURES; every ROWS_PER_GROUP of them are written."""
        self._pending.append(row)
        if len(self._pending) == ROWS_PER_GROUP:
            self._flush()

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, *_: object) -> None:
        """After a failure; a file that is given up may fail to close as well."""
        with suppress(OSError):
            self._close()

    def finish(self) -> None:
        """Write pending rows (a split without rows becomes an empty shard) and give the shards their names."""
        if self._pending or not self._shards:
            self._flush()
        self._close()
        for number, shard in enumerate(self._shards):
            shard.rename(self._folder / f"{self._split}-{number:05d}-of-{len(self._shards):05d}.parquet")

    def _close(self) -> None:
        writer, self._writer = self._writer, None
        if writer is not None:
            writer.close()

    def _flush(self) -> None:
        schema = SHOWN_FEATURES.arrow_schema
        if self._writer is None:
            self._shards.append(self._folder / f"{self._split}-{len(self._shards)}.parquet")
            self._writer = pq.ParquetWriter(self._shards[-1], schema, write_page_checksum=True)
        self._writer.write_table(pa.Table.from_pylist(self._pending, schema=schema))
        self._pending.clear()
        if self._shards[-1].stat().st_size > SHARD_BYTES:
            self._close()


class FileHash(NamedTuple):
    """Of a Parquet file: bytes, SHA-256 of everything, and of the footer, which no page checksum covers."""

    bytes: int
    sha256: str
    footer_sha256: str


def hash_file(path: Path) -> FileHash:
    """Return size and SHA-256 of a Parquet file. Raises OSError."""
    return FileHash(path.stat().st_size, sha256(path), footer_hash(str(path)))


def footer_hash(url: str) -> str:
    """SHA-256 of a Parquet file's footer, "" if it has none. url: a path or an fsspec URL. Raises OSError."""
    with fsspec.open(url, "rb", cache_type="none") as file:
        size = file.seek(0, 2)
        file.seek(max(size - 8, 0))
        tail = file.read(8)
        length = int.from_bytes(tail[:4], "little") + 8
        if len(tail) < 8 or length > size:
            return ""
        file.seek(size - length)
        return hashlib.sha256(file.read(length)).hexdigest()


def check_footer(url: str, wanted: dict[str, Any] | None) -> None:
    """Raise UserError if a file's footer is not the one that the manifest knows. wanted: None = nothing is known."""
    if wanted is not None and footer_hash(url) != wanted["footer_sha256"]:
        raise damaged(url, "its footer has changed since it was written")


def check_file(path: Path, wanted: dict[str, Any] | None) -> None:
    """Raise UserError if a file is not the one that the manifest knows. wanted: None = nothing is known."""
    if wanted is None:
        return
    try:
        same = path.stat().st_size == wanted["bytes"] and sha256(path) == wanted["sha256"]
    except OSError as error:
        raise UserError(f"could not read {path} ({error.strerror or error})") from error
    if not same:
        raise damaged(str(path), "it has changed since it was written")


def damaged(place: str, why: object) -> UserError:
    """The error for a prepared file that cannot be trusted."""
    reason = first_line(why) if isinstance(why, Exception) else why
    return UserError(f"{place} is damaged ({reason}); copy it again, or remove its folder and prepare it again")


def check_columns(place: str, columns: Sequence[str]) -> None:
    """Raise UserError unless a Parquet file has the columns of prepared data."""
    missing = sorted(set(FEATURES) - set(columns))
    if missing:
        raise UserError(
            f"{place} has no column {', '.join(missing)} (it has {', '.join(columns)}); make it with "
            f"amltrain data prepare"
        )


def check_values(place: str, columns: pa.Table) -> None:
    """Raise UserError for a null, or a referent without sentences, where prepared data has none.

    columns: everything but the images, of FEATURES' types. Lists are read where they lie, so that this costs little.
    """
    empty = [name for name in ("image_id", "file_name", "height", "width", "referents") if columns[name].null_count]
    for chunk in columns["referents"].chunks:
        referents = chunk.flatten()
        nested = {name: pc.struct_field(referents, name) for name in ("ref_id", "ann_ids", "no_target", "mask")}
        nested |= {f"mask.{name}": pc.struct_field(nested["mask"], name) for name in ("size", "counts")}
        sentences = pc.struct_field(referents, "sentences")
        texts = sentences.flatten()
        nested |= {f"sentences.{name}": pc.struct_field(texts, name) for name in ("sent_id", "sent", "raw")}
        empty += [f"referents.{name}" for name, values in nested.items() if values.null_count]
        fewest = pc.min(pc.list_value_length(sentences)).as_py()
        if sentences.null_count or fewest == 0:
            empty.append("referents.sentences")
    if empty:
        raise damaged(place, f"{empty[0]} lacks a value")


WINDOW = 8
"""Row groups that a streamed training mixes at a time, about a thousand expressions, and that a reader keeps."""
_IMAGE = "image"
_SMALL = [name for name in FEATURES if name != _IMAGE]
_SMALL_SCHEMA = pa.schema([FEATURES.arrow_schema.field(name) for name in _SMALL])
_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EFBIG}


class Rows(Protocol):
    """columns: everything but the images, `columns.column(name)[row]`. row_group [rows] int64: which rows are read
    together; None if every row can be read alone.
    """

    columns: Any
    row_group: np.ndarray | None

    def __len__(self) -> int: ...

    def image_bytes(self, row: int) -> bytes:
        """The encoded image of a row."""


class MappedRows:
    """Rows of a `datasets.Dataset` as `open_prepared` gives it."""

    row_group: np.ndarray | None = None

    def __init__(self, rows: datasets.Dataset) -> None:
        self.columns = rows.data
        self._images = rows.data.column(_IMAGE)

    def __len__(self) -> int:
        return len(self._images)

    def image_bytes(self, row: int) -> bytes:
        """The encoded image of a row."""
        return self._images[row]["bytes"].as_py()


class StreamedRows:
    """Rows of Parquet files. The small columns are read once; images a row group at a time, the last ones kept."""

    def __init__(self, urls: Sequence[str], hashes: dict[str, Any] | None = None) -> None:
        """urls: paths or fsspec URLs (hf://datasets/user/name/...), in order. hashes: `files` of the manifest, by file
        name. Raises UserError for what is missing, damaged or changed.
        """
        self.urls = list(urls)
        self._metadata: list[pq.FileMetaData] = []
        tables = []
        for url in tqdm(
            self.urls, desc="read index", unit="file", leave=False, disable=True if len(self.urls) < 2 else None
        ):
            with _Reading(url):
                check_footer(url, (hashes or {}).get(url.rpartition("/")[2]))
                with _open(url) as file:
                    parquet = pq.ParquetFile(file, pre_buffer=True, page_checksum_verification=True)
                    check_columns(url, parquet.schema_arrow.names)
                    self._metadata.append(parquet.metadata)
                    tables.append(parquet.read(columns=_SMALL).select(_SMALL).cast(_SMALL_SCHEMA))
                    check_values(url, tables[-1])
        self.columns = pa.concat_tables(tables)
        self._groups = [(file, g) for file, m in enumerate(self._metadata) for g in range(m.num_row_groups)]
        sizes = [self._metadata[file].row_group(g).num_rows for file, g in self._groups]
        self.row_group: np.ndarray | None = np.repeat(np.arange(len(sizes)), sizes)
        self._first_row = np.concatenate([[0], np.cumsum(sizes)])
        self._kept: OrderedDict[int, pa.ChunkedArray] = OrderedDict()

    def __len__(self) -> int:
        return int(self._first_row[-1])

    def image_bytes(self, row: int) -> bytes:
        """The encoded image of a row."""
        group = int(np.searchsorted(self._first_row, row, side="right")) - 1
        images = self._kept.pop(group) if group in self._kept else self._read(group)
        self._kept[group] = images
        if len(self._kept) > WINDOW:
            self._kept.popitem(last=False)
        return images[row - int(self._first_row[group])]["bytes"].as_py()

    def _read(self, group: int) -> pa.ChunkedArray:
        number, row_group = self._groups[group]
        # opened every time: a worker must not share an open file with the process that it was forked from
        with _Reading(self.urls[number]), _open(self.urls[number]) as file:
            parquet = pq.ParquetFile(
                file, metadata=self._metadata[number], pre_buffer=True, page_checksum_verification=True
            )
            return parquet.read_row_group(row_group, columns=[_IMAGE]).column(_IMAGE)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_kept": OrderedDict()}


def open_rows(prepared: str, dataset: str, split: str, *, streaming: bool = False) -> Rows:
    """Rows of one split of one data set, from a folder or a Hub data set id. Raises UserError if there are none."""
    if not streaming:
        mapped = MappedRows(open_prepared(prepared, dataset, split))
        check_values(f"{dataset}/{split} of {prepared}", mapped.columns)
        return mapped
    urls = local_shards(prepared, dataset, split)
    if urls is None:
        with _Reading(f"Hub data set {prepared}"):
            files = fsspec.filesystem("hf").glob(f"datasets/{prepared}/{dataset}/{split}-*.parquet")
        if not files:
            raise UserError(f"Hub data set {prepared} has no {dataset}/{split}-*.parquet")
        urls = [f"hf://{path}" for path in sorted(files)]
    return StreamedRows(urls, _hashes(prepared, dataset))


def open_prepared(prepared: str, dataset: str, split: str, *, streaming: bool = False) -> Dataset | IterableDataset:
    """Rows of `FEATURES` of one split of one data set.

    prepared: the folder that holds `<dataset>/<split>-*.parquet`, or a Hub data set id with the same files.
    Raises UserError when they are missing, damaged or changed, and when the cache of `datasets` cannot be written.
    """
    shards = local_shards(prepared, dataset, split)
    files = shards or f"hf://datasets/{prepared}/{dataset}/{split}-*.parquet"
    try:
        for shard in shards or ():  # `datasets` would fill a column that is not there with nulls
            check_columns(shard, pq.read_schema(shard).names)
        with _quiet():
            builder = datasets.load_dataset_builder("parquet", data_files={split: files}, features=FEATURES)
            if streaming:
                return builder.as_streaming_dataset(split)
            if shards is not None and not os.path.exists(builder.cache_dir):
                hashes = _hashes(prepared, dataset) or {}
                for shard in shards:  # the copy is made once; it would carry a flipped bit on for good
                    check_file(Path(shard), hashes.get(Path(shard).name))
            if shards is not None and not sum(pq.read_metadata(shard).num_rows for shard in shards):
                raise UserError(f"split {split} of {dataset} has no rows; choose another split of {prepared}")
            builder.download_and_prepare()
            return builder.as_dataset(split)
    except UserError:
        raise
    except (OSError, ValueError, DatasetsError, pa.ArrowException) as error:
        cause = error.__cause__ if isinstance(error, DatasetGenerationError) and error.__cause__ else error
        why = shorten(str(cause), 300)  # `datasets` prints whole schemas
        if isinstance(cause, OSError) and cause.errno in (*_NO_ROOM, *NO_LOCKS):
            otherwise = "set HF_DATASETS_CACHE to another folder, or set data.streaming true, which needs no copy"
            raise UserError(
                f"could not write the memory-mapped copy of {dataset}/{split} below "
                f"{datasets.config.HF_DATASETS_CACHE} ({cause.strerror or why}); {cure(cause, otherwise)}"
            ) from error
        fix = (
            f"copy it again, or remove {prepared}/{dataset} and prepare it again"
            if shards is not None
            else "it is not a folder here either: run amltrain data prepare first"
        )
        raise UserError(f"could not read {dataset}/{split} from {prepared} ({why}); {fix}") from error


def local_shards(prepared: str, dataset: str, split: str) -> list[str] | None:
    """Paths of one split's Parquet files, in order; None if `prepared` is a Hub data set id. Raises UserError."""
    check_split(dataset, split, prepared)
    folder = Path(prepared)
    if folder.is_dir():
        paths = sorted(str(path) for path in folder.glob(f"{dataset}/{split}-*.parquet"))
        if not paths:
            there = sorted(path.parent.name for path in folder.glob("*/manifest.json"))
            raise UserError(
                f"{prepared} has no {dataset}/{split}-*.parquet (it holds {', '.join(there) or 'nothing prepared'}); "
                f"run amltrain data prepare --dataset {dataset}"
            )
        return paths
    if prepared.count("/") == 1 and not prepared.startswith((".", "/")):
        return None
    raise UserError(f"{prepared} is not a folder; run amltrain data prepare --dataset {dataset} --output {prepared}")


def _hashes(prepared: str, dataset: str) -> dict[str, Any] | None:
    """Hashes of the files by name, as the manifest keeps them; None for data prepared before it did."""
    manifest = find_manifest(prepared, dataset)
    return (manifest or {}).get("files")


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bar for the memory-mapped copy, which takes a second."""
    shown = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()


def _open(url: str) -> Any:
    return fsspec.open(url, "rb", cache_type="none")  # pyarrow asks for exactly what it needs


class _Reading:
    """Turn errors while reading from `place` into a UserError."""

    def __init__(self, place: str) -> None:
        self.place = place

    def __enter__(self) -> None: ...

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, OSError) and "crc" in str(error).lower():
            raise damaged(self.place, error) from error
        if isinstance(error, (OSError, pa.ArrowException)):
            raise UserError(f"could not read {self.place}: {error}") from error
