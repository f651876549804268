"""Where samples come from: rows of the prepared Parquet files, in any order.

MappedRows    a memory-mapped copy of the files, which `datasets` keeps in its cache
StreamedRows  the files themselves, on a disk or the Hub: one row group is read at a time, no copy is made

A stream of `datasets` only goes forward, so going on in mid-epoch would read all that came before, and every process
would draw other samples. Parquet keeps its rows in groups that can be read alone: a sampler that stays within a few of
them at a time (see `EpochSampler`) gets the same samples with the same numbers as from the copy, from any place on.
"""

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, Protocol

import datasets
import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm.auto import tqdm

from amltrain.data.prepared import check_columns, local_shards, open_prepared
from amltrain.data.schema import FEATURES
from amltrain.errors import UserError

WINDOW = 8
"""Row groups that a streamed training mixes at a time, about a thousand expressions, and that a reader keeps."""
_IMAGE = "image"
_SMALL = [name for name in FEATURES if name != _IMAGE]


class Rows(Protocol):
    """columns: everything but the images, `columns.column(name)[row]`. row_group [rows] int64: which rows are read
    together; None if every row can be read alone."""

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
        return self._images[row]["bytes"].as_py()


class StreamedRows:
    """Rows of Parquet files. The small columns are read once; images a row group at a time, the last ones kept."""

    def __init__(self, urls: Sequence[str]) -> None:
        """urls: paths or fsspec URLs (hf://datasets/user/name/...), in order. Raises UserError."""
        self.urls = list(urls)
        self._metadata: list[pq.FileMetaData] = []
        tables = []
        for url in tqdm(self.urls, desc="read index", unit="file", leave=False, disable=len(self.urls) < 2):
            with _Reading(url), _open(url) as file:
                parquet = pq.ParquetFile(file, pre_buffer=True)
                check_columns(url, parquet.schema_arrow.names)
                self._metadata.append(parquet.metadata)
                tables.append(parquet.read(columns=_SMALL))
        self.columns = pa.concat_tables(tables)
        self._groups = [(file, g) for file, m in enumerate(self._metadata) for g in range(m.num_row_groups)]
        sizes = [self._metadata[file].row_group(g).num_rows for file, g in self._groups]
        self.row_group: np.ndarray | None = np.repeat(np.arange(len(sizes)), sizes)
        self._first_row = np.concatenate([[0], np.cumsum(sizes)])
        self._kept: OrderedDict[int, pa.ChunkedArray] = OrderedDict()

    def __len__(self) -> int:
        return int(self._first_row[-1])

    def image_bytes(self, row: int) -> bytes:
        group = int(np.searchsorted(self._first_row, row, side="right")) - 1
        images = self._kept.pop(group) if group in self._kept else self._read(group)
        self._kept[group] = images
        if len(self._kept) > WINDOW:
            self._kept.popitem(last=False)
        return images[row - int(self._first_row[group])]["bytes"].as_py()

    def _read(self, group: int) -> pa.ChunkedArray:
        number, row_group = self._groups[group]
        # opened anew every time: a worker must not share an open file with the process that it was forked from
        with _Reading(self.urls[number]), _open(self.urls[number]) as file:
            parquet = pq.ParquetFile(file, metadata=self._metadata[number], pre_buffer=True)
            return parquet.read_row_group(row_group, columns=[_IMAGE]).column(_IMAGE)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_kept": OrderedDict()}


def open_rows(prepared: str, dataset: str, split: str, *, streaming: bool = False) -> Rows:
    """Rows of one split of one data set, from a folder or a Hub data set id. Raises UserError if there are none."""
    if not streaming:
        return MappedRows(open_prepared(prepared, dataset, split))
    urls = local_shards(prepared, dataset, split)
    if urls is None:
        with _Reading(f"Hub data set {prepared}"):
            files = fsspec.filesystem("hf").glob(f"datasets/{prepared}/{dataset}/{split}-*.parquet")
        if not files:
            raise UserError(f"Hub data set {prepared} has no {dataset}/{split}-*.parquet")
        urls = [f"hf://{path}" for path in sorted(files)]
    return StreamedRows(urls)


def _open(url: str) -> Any:
    return fsspec.open(url, "rb", cache_type="none")  # pyarrow asks for exactly what it needs


class _Reading:
    """What goes wrong while reading from `place` becomes a UserError."""

    def __init__(self, place: str) -> None:
        self.place = place

    def __enter__(self) -> None: ...

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, (OSError, pa.ArrowException)):
            raise UserError(f"could not read {self.place}: {error}") from error
