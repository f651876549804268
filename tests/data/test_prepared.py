"""The prepared form is opened from a folder and from a Hub id alike."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from amltrain.data.rows import open_prepared
from amltrain.errors import UserError


def test_a_folder_gives_the_same_rows_mapped_and_streamed(prepared: str) -> None:
    for split in ("train", "val", "testB"):
        mapped, streamed = (open_prepared(prepared, "refshapes+", split, streaming=s) for s in (False, True))
        assert list(mapped) == list(streamed)


def test_a_hub_id_gives_the_rows_of_the_same_folder(prepared: str, tmp_path: Path) -> None:
    program = [sys.executable, str(Path(__file__).with_name("hub_files.py")), prepared]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "CACHE": str(tmp_path)}
    done = subprocess.run(program, capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = list(open_prepared(prepared, "refshapes", "val"))
    expected = [[row["image_id"] for row in rows], [hashlib.sha1(row["image"]["bytes"]).hexdigest() for row in rows]]
    assert [json.loads(line) for line in done.stdout.splitlines()] == [expected] * 3


def test_what_is_not_there_is_said(prepared: str, tmp_path: Path) -> None:
    for place, message in (
        ("nobody/nothing", "could not read refshapes/val from nobody/nothing .* run amltrain data prepare first"),
        (str(tmp_path / "x"), "x is not a folder; run amltrain data prepare --dataset refshapes"),
        (str(tmp_path), r"has no refshapes/val-\*\.parquet \(it holds nothing prepared\)"),
    ):
        with pytest.raises(UserError, match=message):
            open_prepared(place, "refshapes", "val")
    with pytest.raises(UserError, match="refshapes has no split 'vall'"):
        open_prepared(prepared, "refshapes", "vall")


def test_a_missing_column_is_said(prepared: str, tmp_path: Path) -> None:
    (source,) = Path(prepared).glob("refshapes/val-*")
    (tmp_path / "refshapes").mkdir()
    pq.write_table(pq.read_table(source).drop_columns("referents"), tmp_path / "refshapes" / source.name)
    with pytest.raises(UserError, match=rf"refshapes/{source.name} has no column referents \(it has .*; make it with"):
        open_prepared(str(tmp_path), "refshapes", "val")


def test_a_truncated_file_is_said(prepared: str, tmp_path: Path) -> None:
    folder = tmp_path / "refshapes"
    folder.mkdir()
    (source,) = Path(prepared).glob("refshapes/val-*")
    (folder / source.name).write_bytes(source.read_bytes()[:2000])
    with pytest.raises(UserError, match=r"could not read refshapes/val .*corrupted.*remove .*refshapes and prepare it"):
        open_prepared(str(tmp_path), "refshapes", "val")
