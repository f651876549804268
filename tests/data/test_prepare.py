"""Preparing through the command line: what bad input gets, and that nothing half-written is left."""

import multiprocessing
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from amltrain.commands.prepare import main
from amltrain.data import prepare as module
from amltrain.data import rows as parquet
from amltrain.data.catalog import DATASETS, Counts, read_manifest
from amltrain.data.prepare import find_images, prepare
from amltrain.data.rows import open_prepared
from amltrain.data.sources.refer import read_refer
from tests.data.original import IMAGES, Original

FORK = multiprocessing.get_context("fork")
FREE_UP_SPACE = "could not write .*refcoco.*; nothing was left there; free up space, or choose another output"


def run(original: Original, *options: str, output: str = "prepared") -> Path:
    folder = original.root / output
    main(["--dataset", original.dataset, "--refer_root", str(original.root), "--output", str(folder), *options])
    return folder


def rejected(capsys: pytest.CaptureFixture[str], original: Original, *options: str) -> str:
    """The one line that is said, with exit code 2; nothing is left beside an empty output folder."""
    with pytest.raises(SystemExit) as stop:
        run(original, *options)
    assert stop.value.code == 2
    said = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert len(said) == 1
    left = [path.name for path in (original.root / "prepared").rglob("*") if not path.name.endswith(".lock")]
    assert left == []
    return said[0]


def cut_image(o: Original) -> None:
    o.image_file(1).write_bytes(o.image_file(1).read_bytes()[:400])


def other_size(o: Original) -> None:
    o.images[1]["width"] += 9
    o.write()
    o.image_file(1).write_bytes(o.image_file(0).read_bytes())


def break_polygon(o: Original) -> None:
    o.annotations[1]["segmentation"] = [[1, 2, 3]]
    o.write()


def empty_sentences(o: Original) -> None:
    o.refs[1]["sentences"][0] |= {"sent": " ", "raw": ""}
    o.write()


def no_annotation(o: Original) -> None:
    o.refs[1]["ann_id"] = 77
    o.write()


def no_image_entry(o: Original) -> None:
    o.refs[1]["image_id"] = 77
    o.write()


FAULTS: list[tuple[Callable[[Original], object], str, int]] = [
    (
        lambda o: o.image_file(1).unlink(),
        r"image COCO_train2014_0+2\.jpg with 1 refs: the file is missing in",
        2,
    ),
    (cut_image, r"image COCO_train2014_0+2\.jpg with 1 refs: the file is damaged", 2),
    (other_size, "it is 30 x 40 pixels, its annotations say 30 x 49", 2),
    (break_polygon, "ref 1002 of image 2: broken segmentation: a polygon has fewer than 3 points", 2),
    (empty_sentences, "sentence 20 of ref 1002 of image 2: it is empty", 1),
    (no_annotation, r"ref 1002 of image 2: broken segmentation: .*instances\.json has no annotation 77", 2),
    (no_image_entry, r"image 77: .*instances\.json does not list it", 2),
]


@pytest.mark.parametrize(("spoil", "message", "lost"), FAULTS)
def test_a_fault_stops_the_run_or_is_counted_and_reported(
    spoil: Callable[[Original], object],
    message: str,
    lost: int,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    original = Original(tmp_path).write()
    spoil(original)
    said = rejected(capsys, original)
    assert re.search(
        rf"refcoco: {lost} of 24 expressions in .* cannot be used so far, more than max_skipped = 0.001", said
    )
    assert re.search(message, said) and "correct the files or raise max_skipped" in said
    folder = run(original, "--max_skipped", "0.1")
    shown = capsys.readouterr().out
    assert re.search(message, shown) and f"{lost} expressions skipped" in shown
    manifest = read_manifest(folder / "refcoco")
    assert sum(entry["expressions"] for entry in manifest["skipped"]) == lost
    assert sum(split["expressions"] for split in manifest["splits"].values()) == 24 - lost
    rows = [row for shard in (folder / "refcoco").glob("*.parquet") for row in pq.read_table(shard).to_pylist()]
    assert sum(len(r["sentences"]) for row in rows for r in row["referents"]) == 24 - lost


def test_a_dropped_polygon_is_reported_though_nothing_is_lost(tmp_path: Path) -> None:
    original = Original(tmp_path)
    original.annotations[1]["segmentation"].append([1, 2, 3])
    manifest = prepare("refcoco", original.write().root, tmp_path / "prepared", progress=False)
    assert [(e["what"], e["why"], e["expressions"]) for e in manifest["skipped"]] == [
        ("a polygon of ref 1002 of image 2", "a polygon has fewer than 3 points", 0)
    ]
    assert manifest["splits"]["train"] == Counts(3, 6, 3)._asdict()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--dataset", "refcoco+-umd"], r"refcoco+ has no split by 'umd'; it has refcoco+ (unc)"),
        (["--dataset", "refcoc"], "unknown data set 'refcoc'; did you mean refcoco"),
        (["--dataset", "refcoco+"], "refcoco+ has no refs(unc).p; put refcoco+'s original files there"),
        (["--image_root", "/nowhere"], "--image_root: there is no /nowhere"),
        (["--hub", "jxu124/refcoco"], "--hub stands for --refer_root; leave one of them out"),
        (["--max_skipped", "nan"], "--max_skipped is nan; it is a share"),
        (["--max_skipped", "-1"], "--max_skipped is -1.0; it is a share"),
        (
            ["--held_out_ids", "ids.json"],
            "--held_out_ids leaves images out of a combined training, and refcoco is none",
        ),
        (["--also_held_out", "grefcoco"], "give it to the training (data.also_held_out)"),
        (["--dataset", "combined-unfiltered", "--held_out_ids", "ids.json"], "and combined-unfiltered is none"),
    ],
)
def test_wrong_arguments(options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert message in rejected(capsys, Original(tmp_path).write(), *options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--dataset", "combined"], "refcoco+ has no refs(unc).p; put refcoco+'s original files there"),
        (["--held_out_ids", "ids.json"], "ids.json is no JSON list of image ids"),
        (["--also_held_out", "grefcoco"], "--also_held_out grefcoco: "),
        (["--also_held_out", "grefcocoo"], "unknown data set 'grefcocoo'"),
    ],
)
def test_a_late_fault_is_found_before_anything_is_read(
    options: list[str],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("refcoco", "refcocog"):
        original = Original(tmp_path, name).write()
    monkeypatch.setattr(module, "read_refer", lambda *_: pytest.fail("the annotations were read"))
    assert message in rejected(capsys, original, "--dataset", "refcoco", "refcocog", *options)
    assert not (tmp_path / "prepared").exists()


def test_annotations_from_the_hub_need_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--dataset", "refcoco", "--output", str(tmp_path / "prepared"), "--hub", "jxu124/refcoco"])
    assert "--hub needs --image_root" in capsys.readouterr().err


def test_an_empty_hub_folder_is_found_before_anything_is_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    (tmp_path / "one" / "train.csv").write_text("no,referents")
    hub = ["--hub", str(tmp_path / "one"), str(tmp_path / "two"), "--image_root", str(tmp_path)]
    with pytest.raises(SystemExit):
        main(["--dataset", "refcoco", "refcocog", "--output", str(tmp_path / "prepared"), *hub])
    assert f"could not read {tmp_path / 'two'}" in capsys.readouterr().err


def test_no_image_folder_at_all(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    original = Original(tmp_path).write()
    for number in range(len(original.images)):
        original.image_file(number).unlink()
    assert "set --image_root to the folder of COCO's train2014 images" in rejected(capsys, original)


@pytest.mark.parametrize("sub", ["", "train2014", "images/train2014", "coco/train2014", IMAGES])
def test_images_are_found_where_releases_put_them(sub: str, tmp_path: Path) -> None:
    original = Original(tmp_path / "refer").write()
    folder = tmp_path / "pictures" / sub
    folder.parent.mkdir(parents=True, exist_ok=True)
    (original.root / IMAGES).rename(folder)
    assert find_images(read_refer(original.root, "refcoco"), tmp_path / "pictures")[1] == folder


def test_what_is_there_already(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    original = Original(tmp_path).write()
    folder = run(original) / "refcoco"
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    run(original)  # the same files: nothing is done
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before
    original.refs[0]["sentences"][0]["sent"] = "another"
    original.write()
    for message in (
        "was prepared from other files; remove the folder",
        "is damaged or no JSON",
        "is not a manifest of",
    ):
        with pytest.raises(SystemExit):
            run(original)
        assert message in capsys.readouterr().err
        (folder / "manifest.json").write_text("{" if "other" in message else "{}")
    (folder / "manifest.json").unlink()
    with pytest.raises(SystemExit):
        run(original)
    assert "holds something that was not prepared here" in capsys.readouterr().err


def test_an_output_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    original = Original(tmp_path).write()
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit):
        run(original, output="file/prepared")
    assert "could not write" in capsys.readouterr().err


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """The kernel rejects to let a file grow beyond so many bytes, as a full disk would."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize("limit", [1, 3000])
def test_a_full_disk_leaves_nothing(limit: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    original = Original(tmp_path, per_split=8).write()
    (tmp_path / "prepared").mkdir()
    with largest_file(limit):
        said = rejected(capsys, original)
    assert re.search(FREE_UP_SPACE, said)
    run(original)


def test_killed_in_the_middle_and_run_again(tmp_path: Path) -> None:
    """SIGKILL, for a child that has begun to write; then the whole thing again in its place."""
    original = Original(tmp_path, per_split=6).write()

    def prepare_slowly() -> None:
        finish = module.ShardWriter.finish
        module.ShardWriter.finish = lambda writer: (finish(writer), time.sleep(60))
        prepare("refcoco", original.root, tmp_path / "prepared", progress=False)

    child = FORK.Process(target=prepare_slowly)
    child.start()
    deadline = time.monotonic() + 60
    while not list((tmp_path / "prepared").glob(".refcoco.partial/train-00000-of-*")) and time.monotonic() < deadline:
        time.sleep(0.02)
    child.kill()
    child.join(60)
    assert child.exitcode == -signal.SIGKILL
    assert read_manifest(tmp_path / "prepared" / "refcoco") is None
    run(original)
    visible = [path.name for path in (tmp_path / "prepared").iterdir() if not path.name.endswith(".lock")]
    assert sorted(visible) == ["README.md", "refcoco"]  # what the killed run had begun is gone
    assert open_prepared(str(tmp_path / "prepared"), "refcoco", "train").num_rows == 6


def test_two_at_once(tmp_path: Path) -> None:
    original = Original(tmp_path, per_split=40).write()
    arguments = {"dataset": "refcoco", "refer_root": original.root, "output": tmp_path / "prepared", "progress": False}
    children = [FORK.Process(target=prepare, kwargs=arguments) for _ in range(2)]
    for child in children:
        child.start()
    for child in children:
        child.join(60)
    assert [child.exitcode for child in children] == [0, 0]
    assert open_prepared(str(tmp_path / "prepared"), "refcoco", "train").num_rows == 40


def test_large_data_is_cut_into_shards_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parquet, "ROWS_PER_GROUP", 4)
    monkeypatch.setattr(parquet, "SHARD_BYTES", 6000)
    manifest = prepare("refcoco", Original(tmp_path, per_split=18).write().root, tmp_path / "p", progress=False)
    names = sorted(path.name for path in (tmp_path / "p" / "refcoco").glob("train-*"))
    assert len(names) > 1 and names == [f"train-{i:05d}-of-{len(names):05d}.parquet" for i in range(len(names))]
    rows = open_prepared(str(tmp_path / "p"), "refcoco", "train")
    assert rows["image_id"][:] == list(range(1, 19)) and manifest["splits"]["train"]["images"] == 18
    streamed = open_prepared(str(tmp_path / "p"), "refcoco", "train", streaming=True)
    assert list(streamed) == list(rows)


def test_counts_are_compared_with_the_published_ones(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Original(tmp_path).write()
    published = {"train": Counts(3, 6, 3), "val": Counts(3, 7), "testA": Counts(3, 6)}
    entry = DATASETS["refcoco"]
    named = entry._replace(value=entry.value._replace(published=published))
    monkeypatch.setitem(DATASETS._entries, "refcoco", named)
    folder = run(original)
    assert read_manifest(folder / "refcoco")["published"] == {
        "train": "as published",
        "val": "published: 3 refs, 7 expressions",
        "testA": "as published",
    }
    assert "as published" in capsys.readouterr().out


def test_the_command_line_in_a_process_of_its_own(tmp_path: Path, repository: Path) -> None:
    original = Original(tmp_path).write()
    original.image_file(0).unlink()
    command = [sys.executable, str(repository / "launch" / "prepare_data.py"), "--dataset", "refcoco"]
    done = subprocess.run(
        [*command, "--refer_root", str(tmp_path), "--output", str(tmp_path / "prepared")],
        capture_output=True, text=True, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: refcoco: 2 of 24 expressions in ")
    assert list((tmp_path / "prepared").glob("[!.]*")) == []
