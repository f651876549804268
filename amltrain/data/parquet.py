"""The prepared form: one row per image, its referents nested, in Parquet files that notice damage.

Every page has a checksum, which readers verify; the manifest keeps each file's SHA-256 and that of its footer.
"""

import hashlib
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import fsspec
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from datasets import Features, Image, Value
from datasets import Sequence as ListOf

from amltrain.errors import UserError, first_line
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
            f"{place} has no column {', '.join(missing)} (it has {', '.join(columns)}); make it with amltrain prepare"
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
