"""Inputs of the kinds that public bug reports of this field describe, each with its right value.

The inputs lie in `cases` of the shared folder; a test is skipped where it is missing.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from pycocotools import mask as coco

from amltrain.commands.prepare import main
from amltrain.commands.train import read_run
from amltrain.data.images import decode_image
from amltrain.data.rows import open_prepared
from amltrain.data.segmentation import decode_mask
from amltrain.errors import UserError
from amltrain.evaluation.prediction_files import find_predictions

RED = (213, 33, 33)


@pytest.fixture
def cases(shared_dir: Path) -> Path:
    folder = shared_dir / "cases"
    if not folder.is_dir():
        pytest.skip("the cases are not here (set AMLTRAIN_SHARED)")
    return folder


class Row:
    """A prepared referent: size of its row, area and box of the mask, mean colour under it, sentences."""

    def __init__(self, row: dict[str, Any], referent: dict[str, Any]) -> None:
        size = (row["height"], row["width"])
        pixels = np.asarray(decode_image(row["image"]["bytes"], "x", size))
        mask = decode_mask(referent["mask"])
        rows, columns = np.nonzero(mask)
        self.size, self.area, self.ref = size, int(mask.sum()), referent["ref_id"]
        self.box = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1) if len(rows) else ()
        self.colour = pixels[mask > 0].mean(0) if len(rows) else None
        self.sentences = [sentence["raw"] for sentence in referent["sentences"]]
        self.no_target = referent["no_target"]

    def is_red(self) -> bool:
        return self.colour is not None and float(np.abs(self.colour - RED).max()) < 15


def prepared(tmp_path: Path, *arguments: str, name: str = "mine") -> list[Row]:
    named = [] if "--dataset" in arguments else ["--name", name]
    main([*map(str, arguments), *named, "--output", str(tmp_path / "p"), "--workers", "1"])
    rows = []
    for path in sorted((tmp_path / "p" / name).glob("*.parquet")):
        rows += [Row(row, referent) for row in pq.read_table(path).to_pylist() for referent in row["referents"]]
    shutil.rmtree(tmp_path / "p" / name)
    return rows


def rejected(capsys: pytest.CaptureFixture[str], tmp_path: Path, *arguments: str) -> str:
    with pytest.raises(SystemExit) as stop:
        prepared(tmp_path, *arguments)
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert "Traceback" not in said
    return said


def test_01_a_turned_photograph(cases: Path, tmp_path: Path) -> None:
    phone, plain = prepared(
        tmp_path, "--table", str(cases / "report-01/coco.json"), "--images", str(cases / "report-01/photos")
    )
    assert (phone.size, phone.area, phone.box) == ((64, 48), 320, (8, 40, 24, 60)) and phone.is_red()
    assert (plain.size, plain.area) == ((48, 64), 400) and plain.is_red()


@pytest.mark.parametrize(("table", "count"), [("annotations.json", 2), ("t.csv", 1)])
def test_03_back_slashes(table: str, count: int, cases: Path, tmp_path: Path) -> None:
    rows = prepared(tmp_path, "--table", str(cases / "report-03/data" / table))
    assert [row.area for row in rows] == [256] * count and all(row.is_red() for row in rows)


@pytest.mark.parametrize("table", ["u2028", "u0085"])
def test_04_line_separators_in_json(table: str, cases: Path, tmp_path: Path) -> None:
    folder = cases / "report-04"
    rows = prepared(tmp_path, "--table", str(folder / f"{table}.jsonl"), "--images", str(folder / "photos"))
    assert [row.sentences for row in rows] == [["the red square"], ["the red thing"]]


def test_05_lists_of_pandas(cases: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = ("--images", str(cases / "report-05/photos"))
    (row,) = prepared(tmp_path, "--table", str(cases / "report-05/t.csv"), *images)
    assert row.sentences == ["the red square", "left thing"] and row.area == 256
    (row,) = prepared(tmp_path, "--table", str(cases / "report-05/t2.csv"), *images)
    assert row.area == 32
    said = rejected(capsys, tmp_path, "--table", str(cases / "report-05/t3.csv"), *images)
    assert "row 1: the mask looks like a list and is not JSON" in said and "numpy prints arrays without commas" in said


def test_07_forms_of_polygons(cases: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def table(name: str) -> tuple[str, ...]:
        return ("--table", str(cases / f"report-07/{name}.jsonl"), "--images", str(cases / "report-07/photos"))

    assert [row.area for row in prepared(tmp_path, *table("points1"))] == [256]
    assert [301 <= row.area <= 311 for row in prepared(tmp_path, *table("points2"))] == [True]
    assert [row.area for row in prepared(tmp_path, *table("four"))] == [256]
    assert "four numbers, which are two points" in capsys.readouterr().out
    assert "a box belongs in the column `box`" in rejected(capsys, tmp_path, *table("quad"))
    assert "its coordinates are texts" in rejected(capsys, tmp_path, *table("strings"))
    assert "two points" in rejected(capsys, tmp_path, *table("twotriangle"))


@pytest.mark.parametrize("folder", ["f1", "f2", "f3"])
def test_08_files_of_a_camera(folder: str, cases: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (row,) = prepared(tmp_path, "--folder", str(cases / "report-08" / folder))
    assert row.area == 256 and row.sentences == ["the red square"]
    assert ("classes.txt" in capsys.readouterr().out) == (folder == "f2")


def test_11_names_of_coco_2017(cases: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = cases / "report-11/data"
    for root in (data / "coco/train2017", data / "coco"):
        rows = prepared(
            tmp_path, "--dataset", "refcoco", "--refer_root", str(data), "--image_root", str(root), name="refcoco"
        )
        assert [row.area for row in rows] == [256, 256]
    assert "the pictures have the names of COCO 2017" in capsys.readouterr().out


def test_12_pictures_that_are_links(cases: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hub, refer = tmp_path / "hub", tmp_path / "refer"
    shutil.copytree(cases / "report-12/datasets--me--mine", hub)
    shutil.copytree(cases / "report-12/refer", refer)
    links = {hub / "snapshots/abc/photos/a.jpg": "../../../blobs/1f00"}
    for path in (refer / "images/mscoco/images/train2014").iterdir():
        links[path] = f"../../../../store/{path.name}"
    for path, target in links.items():  # a copy of the cases may have turned links into files
        path.unlink()
        path.symlink_to(target)
    shutil.move(refer / "store", tmp_path / "store")
    for path in (refer / "images/mscoco/images/train2014").iterdir():
        path.unlink()
        path.symlink_to(tmp_path / "store" / path.name)
    table = ("--table", str(hub / "snapshots/abc/t.csv"))
    said = rejected(capsys, tmp_path, *table)
    assert "it is a link that leads outside the folder" in said and "prepare with --follow_links" in said
    assert [row.area for row in prepared(tmp_path, *table, "--follow_links")] == [256]
    published = ("--dataset", "refcoco", "--refer_root", str(refer))
    assert "--follow_links" in rejected(capsys, tmp_path, *published)
    assert [row.area for row in prepared(tmp_path, *published, "--follow_links", name="refcoco")] == [256, 256]


@pytest.mark.parametrize(
    ("table", "sentence"),
    [
        ("semi.csv", "the red square"),
        ("bom.csv", "the red café"),
        ("spaces.csv", "the red square"),
        ("index.csv", "the red square"),
        ("blank.csv", "the red square"),
        ("upper.csv", "the red square"),
        ("utf16.jsonl", "the red square"),
        ("cp1252.csv", None),
        ("cp1252.jsonl", None),
    ],
)
def test_13_spreadsheets(
    table: str, sentence: str | None, cases: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ("--table", str(cases / "report-13" / table), "--images", str(cases / "report-13/photos"))
    if sentence is None:
        assert "is not UTF-8; save it as UTF-8, or name its encoding: --encoding" in rejected(capsys, tmp_path, *given)
        given, sentence = (*given, "--encoding", "cp1252"), "the red café"
    (row,) = prepared(tmp_path, *given)
    assert row.sentences == [sentence] and row.area == 256


def test_14_quotes_in_a_tsv(cases: Path, tmp_path: Path) -> None:
    rows = prepared(tmp_path, "--table", str(cases / "report-14/t.tsv"), "--images", str(cases / "report-14/photos"))
    assert [row.sentences for row in rows] == [['"stop" sign on the left'], ['the 21" screen'], ["red square"]]


def test_15_numbers_of_pandas(cases: Path, tmp_path: Path) -> None:
    def rows(name: str) -> list[Row]:
        return prepared(
            tmp_path, "--table", str(cases / "report-15" / name), "--images", str(cases / "report-15/photos")
        )

    assert [row.ref for row in rows("ids.csv")] == [3, 1]
    for name in ("nt.csv", "nan.csv", "t.parquet"):
        assert [row.no_target for row in rows(name)] == [False, True]
    assert rows("t.parquet")[0].ref == 3


def read_config(tmp_path: Path, text: str) -> Any:
    (tmp_path / "c.yaml").write_text(f"base: [models/caris_tiny]\n{text}")
    found = read_run(["--config", str(tmp_path / "c.yaml")])
    found = found[0] if isinstance(found, tuple) else found
    return getattr(found, "config", found)


def test_19_and_38_values_of_yaml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("SCRATCH", "scratch")
    assert read_config(tmp_path, "optim: {lr: 1e-5}").optim.lr == 1e-5
    assert read_config(tmp_path, "train: {mixed_precision: no}").train.mixed_precision == "no"
    assert read_config(tmp_path, "output: ~/runs/x").output == f"{tmp_path}/runs/x"
    assert read_config(tmp_path, "output: ${SCRATCH}/x").output == "scratch/x"
    assert read_config(tmp_path, "data: {prepared: ~/p}").data.prepared == f"{tmp_path}/p"
    for text in (
        "train: {time_limit: 23:50}",
        "seed: 010",
        "seed: 08",
        "data: {datasets: refcoco}",
        "output: $NOT_SET/x",
    ):
        with pytest.raises(UserError, match=r"c.yaml, line 2: "):
            read_config(tmp_path, text)


def test_22_one_picture_at_a_time() -> None:
    import torch

    from amltrain.models.cris import SentencePyramid

    pyramid = SentencePyramid((8, 8, 8), 8, (8, 8, 8))
    maps = [torch.zeros(1, 8, side, side) for side in (16, 8, 4)]
    with pytest.raises(UserError, match=r"set train.micro_batch_size .* to 2 or more"):
        pyramid.train()(maps, torch.zeros(1, 8))


@pytest.mark.parametrize("number", [37, 95])
def test_23_no_file_locks(
    number: int, cases: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import fcntl

    def no_locks(*_: Any) -> None:
        raise OSError(number, os.strerror(number))

    table = ("--table", str(cases / "report-23/table.csv"), "--images", str(cases / "report-23/photos"))
    main([*table, "--name", "mine", "--output", str(tmp_path / "q"), "--workers", "1"])
    monkeypatch.setattr(fcntl, "flock", no_locks)
    said = rejected(capsys, tmp_path, *table)
    assert "this file system has no file locks: choose a folder on a disk that has them" in said
    assert "free up space" not in said and "remove" not in said
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    with pytest.raises(UserError, match=r"no file locks: .*set HF_DATASETS_CACHE to another folder, or") as stop:
        open_prepared(str(tmp_path / "q"), "mine", "train")
    assert "remove" not in str(stop.value)


def test_32_predictions_as_a_list_of_coco(tmp_path: Path) -> None:
    mask = np.zeros((4, 5), np.uint8)
    mask[1:3, 2:4] = 1
    encoded = coco.encode(np.asfortranarray(mask))
    rle = {"size": [4, 5], "counts": encoded["counts"].decode()}
    path = tmp_path / "b.json"
    path.write_text(json.dumps([{"ref_id": 1, "sent_id": 2, "segmentation": rle}]))
    (entry,) = find_predictions(path, "refcoco", "val").entries.values()
    assert isinstance(entry.mask, dict) and np.array_equal(decode_mask(entry.mask), mask)
    path.write_text(json.dumps([[1, 2]]))
    with pytest.raises(UserError, match=r"entry 1: not a prediction \(it is a list\)"):
        find_predictions(path, "refcoco", "val")


def test_35_pictures_that_differ_by_pixels(cases: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = prepared(tmp_path, "--dataset", "rrsis-d", "--refer_root", str(cases / "report-35/data"), name="rrsis-d")
    assert len(rows) == 40 and all(row.area in range(240, 273) for row in rows)
    assert sorted(row.size for row in rows if row.size != (80, 80)) == [(78, 80), (80, 81), (81, 80)]
    said = capsys.readouterr().out
    assert "2 pictures have another size than their annotations state" in said
    assert "1 pictures have other proportions than their annotations state" in said


def test_37_without_the_signals_of_unix(repository: Path) -> None:
    """Windows is not supported, which the package says; what needs no signal starts all the same."""
    hide = (
        "import sys, signal, os\n"
        "for n in ('SIGUSR1', 'SIGUSR2', 'SIGHUP', 'SIGALRM'): delattr(signal, n)\n"
        "for n in ('O_NONBLOCK', 'mkfifo'): delattr(os, n)\n"
        "import amltrain.commands.prepare_data, amltrain.inference.predict, amltrain.training.stopping\n"
    )
    subprocess.run([sys.executable, "-c", hide], check=True, cwd=repository, timeout=200)
    assert "Operating System :: POSIX :: Linux" in (repository / "pyproject.toml").read_text()
