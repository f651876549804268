"""The same samples from a memory-mapped copy and from the Parquet files as they lie, also on a remote file system."""

import pickle
from pathlib import Path

import fsspec
import numpy as np
import pytest

from amltrain.data.loaders import EpochSampler
from amltrain.data.rows import WINDOW, StreamedRows, open_prepared, open_rows
from amltrain.errors import UserError
from tests.data.stand_in import shapes_dataset
from tests.data.test_dataset import equal


def test_streamed_samples_equal_mapped_ones(prepared: str) -> None:
    names = ("refshapes", "refshapes+")
    mapped, streamed = (shapes_dataset(prepared, names=names, streaming=s) for s in (False, True))
    assert len(mapped) == len(streamed) and mapped.counts() == streamed.counts()
    for index in np.random.default_rng(0).permutation(len(mapped))[:60].tolist():
        assert equal(mapped[index], streamed[index])
        assert mapped.info(index) == streamed.info(index)


def test_rows_equal_the_stream_of_the_datasets_library(prepared: str) -> None:
    rows = open_rows(prepared, "refshapes", "train", streaming=True)
    for number, row in enumerate(open_prepared(prepared, "refshapes", "train", streaming=True)):
        assert rows.image_bytes(number) == row["image"]["bytes"]
        assert rows.columns.column("referents")[number].as_py() == row["referents"]
    assert number + 1 == len(rows)


def test_row_groups_are_read_once_while_the_sampler_stays_near(prepared: str, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = shapes_dataset(prepared, unit="referent", streaming=True)
    rows = dataset.splits[0].rows
    assert isinstance(rows, StreamedRows)
    read: list[int] = []
    original = rows._read
    monkeypatch.setattr(rows, "_read", lambda group: read.append(group) or original(group))
    sampler = EpochSampler(
        dataset.split_sizes, seed=0, global_batch_size=8, total_steps=len(dataset) // 8, row_groups=dataset.row_groups()
    )
    for draw in sampler:
        dataset.picture(draw.index)
    assert sorted(read) == [0, 1, 2]


def test_only_a_window_of_row_groups_is_kept(prepared: str, tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    (source,) = Path(prepared).glob("refshapes/train-*.parquet")
    table = pq.read_table(source)
    pq.write_table(table, tmp_path / "small.parquet", row_group_size=5)
    rows = StreamedRows([str(tmp_path / "small.parquet")])
    expected = table.column("image").to_pylist()
    for row in np.random.default_rng(0).permutation(len(rows)).tolist():
        assert rows.image_bytes(row) == expected[row]["bytes"]
    assert len(rows._kept) == WINDOW < len(rows) // 5
    assert len(pickle.loads(pickle.dumps(rows))._kept) == 0  # a spawned worker does not get the images


def test_several_files_on_a_remote_file_system(prepared: str) -> None:
    urls = []
    for split in ("val", "train"):
        (source,) = Path(prepared).glob(f"refshapes/{split}-*.parquet")
        urls.append(f"memory://prepared/{split}.parquet")
        with fsspec.open(urls[-1], "wb") as file:
            file.write(source.read_bytes())
    rows = StreamedRows(urls)
    parts = [open_rows(prepared, "refshapes", split) for split in ("val", "train")]
    assert len(rows) == sum(map(len, parts))
    for part, first in zip(parts, (0, len(parts[0])), strict=True):
        for row in (0, len(part) - 1):
            assert rows.image_bytes(first + row) == part.image_bytes(row)


def test_what_is_missing_is_said(prepared: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"refshapesg/val.*amltrain data prepare"):
        open_rows(prepared, "refshapesg", "val", streaming=True)
    with pytest.raises(UserError, match=r"could not read Hub data set nobody/nothing"):
        open_rows("nobody/nothing", "refshapes", "val", streaming=True)
    with pytest.raises(UserError, match=r"could not read .*nothing\.parquet"):
        StreamedRows([str(tmp_path / "nothing.parquet")])
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(UserError, match=r"could not read .*broken\.parquet"):
        StreamedRows([str(tmp_path / "broken.parquet")])
