"""Presized images give exactly the tensors of the uncached path, and only while they are up to date."""

import errno
import json
import multiprocessing
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from amltrain.commands.presize import main
from amltrain.config.schema import DataConfig, Preprocess
from amltrain.data import dataset as dataset_module
from amltrain.data.cache import encode_runs, open_presized, presized_folder, write_presized
from amltrain.data.dataset import OpenSplit, ReferDataset
from amltrain.data.loaders import build_train_dataset
from amltrain.data.mosaic import Mosaic, MosaicOptions
from amltrain.data.rows import open_rows
from amltrain.data.transforms import ImageTransform
from amltrain.errors import UserError
from amltrain.records import Draw
from tests.data.stand_in import word_tokenizer


@pytest.fixture
def own(prepared: str, tmp_path: Path) -> str:
    """A copy of one prepared data set, to write beside."""
    shutil.copytree(Path(prepared) / "refshapes", tmp_path / "prepared/refshapes")
    return str(tmp_path / "prepared")


@pytest.mark.parametrize("resize", ["square", "letterbox"])
@pytest.mark.parametrize("decoder", ["pil", "torchvision"])
def test_presized_samples_are_the_uncached_ones(own: str, resize: str, decoder: str, monkeypatch) -> None:
    transform = ImageTransform(40, resize, "clip")
    rows = open_rows(own, "refshapes", "train")
    write_presized(own, "refshapes", "train", rows, transform, decoder=decoder, progress=False)
    presized = open_presized(own, "refshapes", "train", transform, decoder=decoder)
    plain, cached = (
        ReferDataset([OpenSplit("refshapes", "train", rows, p)], transform, word_tokenizer(), unit="referent",
                     decoder=decoder, keep_original_target=True)
        for p in (None, presized)
    )  # fmt: skip
    expected = [plain[Draw(1, i)] for i in range(0, len(plain), 3)]
    monkeypatch.setattr(dataset_module, "decode_image", lambda *_: pytest.fail("decodes"))
    for index, sample in zip(range(0, len(plain), 3), expected, strict=True):
        found = pickle.loads(pickle.dumps(cached))[Draw(1, index)] if index == 0 else cached[Draw(1, index)]
        assert (found.sentence, found.picture) == (sample.sentence, sample.picture)
        pairs = [(a, b) for a, b in zip(found, sample, strict=True) if isinstance(a, torch.Tensor)]
        assert len(pairs) == 9 and all(torch.equal(a, b) and a.dtype == b.dtype for a, b in pairs)


def test_runs_of_equal_values() -> None:
    values, starts = encode_runs(np.array([[0, 0, 7], [7, 7, 0]], np.uint8))
    assert values.tolist() == [0, 7, 0] and starts.tolist() == [0, 2, 5]


def test_the_command_writes_what_a_run_finds(own: str, capsys: pytest.CaptureFixture[str]) -> None:
    preprocess = Preprocess(
        size=32, resize="square", normalization="imagenet", tokenizer="wordpiece", max_tokens=12, sentence_field="sent"
    )

    def build(**options) -> ReferDataset:
        data = DataConfig(prepared=own, datasets=["refshapes"], **options)
        return build_train_dataset(data, preprocess, word_tokenizer(), mask_parts="union", seed=0)

    assert build().splits[0].presized is None
    with pytest.raises(
        UserError, match=r"presized images of train at 32 px .*amltrain data presize --dataset refshapes"
    ):
        build(presized=True)
    main(["--prepared", own, "--dataset", "refshapes", "--splits", "train", "--size", "32"])
    assert "presized/train-32-square-union-pil: 0.0" in capsys.readouterr().out
    assert build().splits[0].presized is not None and build(presized=True).splits[0].presized is not None
    assert build(presized=False).splits[0].presized is None
    assert build(decoder="torchvision").splits[0].presized is None  # its pixels are others


def test_data_prepared_again_makes_them_stale(own: str) -> None:
    transform, rows = ImageTransform(32), open_rows(own, "refshapes", "val")
    folder = write_presized(own, "refshapes", "val", rows, transform, progress=False)
    written = (folder / "images.npy").stat().st_mtime_ns
    assert write_presized(own, "refshapes", "val", rows, transform, progress=False) == folder
    assert (folder / "images.npy").stat().st_mtime_ns == written  # kept
    manifest = Path(own, "refshapes/manifest.json")
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"again": 1}))
    assert open_presized(own, "refshapes", "val", transform) is None
    write_presized(own, "refshapes", "val", rows, transform, progress=False)
    assert open_presized(own, "refshapes", "val", transform) is not None


def test_a_run_cut_off_leaves_nothing_that_looks_whole(own: str, monkeypatch: pytest.MonkeyPatch) -> None:
    transform, rows = ImageTransform(32), open_rows(own, "refshapes", "val")
    monkeypatch.setattr(ImageTransform, "target", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        write_presized(own, "refshapes", "val", rows, transform, progress=False, workers=1)
    assert open_presized(own, "refshapes", "val", transform) is None


def test_a_damaged_file_is_named(own: str) -> None:
    transform, rows = ImageTransform(32), open_rows(own, "refshapes", "val")
    folder = write_presized(own, "refshapes", "val", rows, transform, progress=False)
    (folder / "images.npy").write_bytes(b"")
    with pytest.raises(UserError, match=r"val-32-square-union-pil is damaged .*write it again"):
        open_presized(own, "refshapes", "val", transform)


def test_a_full_disk_is_said(own: str, monkeypatch: pytest.MonkeyPatch) -> None:
    transform, rows = ImageTransform(32), open_rows(own, "refshapes", "val")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 9, 1))
    with pytest.raises(UserError, match=r"needs .* GiB and the disk has 0\.0 GiB free"):
        write_presized(own, "refshapes", "val", rows, transform, progress=False)
    assert not presized_folder(own, "refshapes", "val", transform, "union", "pil").exists()


def test_augmented_images_are_read_from_the_originals(own: str) -> None:
    transform, rows = ImageTransform(32), open_rows(own, "refshapes", "train")
    write_presized(own, "refshapes", "train", rows, transform, progress=False)
    data = DataConfig(prepared=own, datasets=["refshapes"])
    preprocess = Preprocess(
        size=32, resize="square", normalization="imagenet", tokenizer="wordpiece", max_tokens=12, sentence_field="sent"
    )
    augmented = build_train_dataset(
        data, preprocess, word_tokenizer(), mask_parts="union", seed=0, augmentations=[Mosaic(MosaicOptions())]
    )
    assert augmented.splits[0].presized is None
    assert augmented[0].image.shape == (3, 32, 32)


def write_one(prepared: str, number: int, results: Any, start: str) -> None:
    torch.set_num_threads(1)
    while not Path(start).exists():
        pass
    rows, transform = open_rows(prepared, "refshapes", "train"), ImageTransform(24, "square", "clip")
    try:
        write_presized(prepared, "refshapes", "train", rows, transform, workers=1, progress=False)
        presized = open_presized(prepared, "refshapes", "train", transform)
        results.put([int(presized.image(row).sum()) for row in range(len(presized))])
    except UserError as error:
        results.put(str(error))


@pytest.mark.parametrize("before", ["nothing", "a damaged one", "black images", "one of a run that was killed"])
def test_many_starts_at_once_leave_one_whole_cache(own: str, tmp_path: Path, before: str) -> None:
    rows, transform = open_rows(own, "refshapes", "train"), ImageTransform(24, "square", "clip")
    folder = presized_folder(own, "refshapes", "train", transform, "union", "pil")
    write_presized(own, "refshapes", "train", rows, transform, progress=False)
    presized = open_presized(own, "refshapes", "train", transform)
    plain = [int(presized.image(row).sum()) for row in range(len(presized))]
    assert all(plain)
    if before == "nothing":
        shutil.rmtree(folder)
    elif before == "one of a run that was killed":
        folder.rename(folder.with_name(f".{folder.name}.99.partial"))
    else:
        images = np.load(folder / "images.npy", mmap_mode="r+")
        images[3 if before == "a damaged one" else slice(None)] = 0
        images.flush()
        del images
    forks, start = multiprocessing.get_context("fork"), tmp_path / "start"
    results = forks.Queue()
    writers = [forks.Process(target=write_one, args=(own, n, results, str(start))) for n in range(5)]
    for process in writers:
        process.start()
    start.touch()
    assert [results.get(timeout=120) for _ in writers] == [plain] * 5
    for process in writers:
        process.join()


@pytest.mark.parametrize(
    "name", ["images.npy", "sums.npy", "values.npy", "starts.npy", "first_run.npy", "presized.json"]
)
@pytest.mark.parametrize("harm", ["bit", "cut", "empty", "gone", "zeros"])
def test_the_command_writes_a_damaged_cache_again(own: str, name: str, harm: str) -> None:
    rows, transform = open_rows(own, "refshapes", "val"), ImageTransform(24, "square", "clip")
    folder = write_presized(own, "refshapes", "val", rows, transform, progress=False)
    sound = {path.name: path.read_bytes() for path in folder.iterdir()}
    path, content = folder / name, bytearray(sound[name])
    content[len(content) * 2 // 3] ^= 16
    {
        "bit": lambda: path.write_bytes(content),
        "cut": lambda: path.write_bytes(content[: len(content) // 2]),
        "empty": lambda: path.write_bytes(b""),
        "gone": path.unlink,
        "zeros": lambda: path.write_bytes(bytes(len(content))),
    }[harm]()
    write_presized(own, "refshapes", "val", rows, transform, progress=False)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == sound
    assert not [path for path in folder.parent.iterdir() if path.suffix in (".partial", ".old")]


def test_a_disk_that_cannot_reserve_the_images_is_said_before_they_are_written(
    own: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    rows, transform = open_rows(own, "refshapes", "val"), ImageTransform(24, "square", "clip")
    with pytest.raises(UserError, match=r"could not write .*No space left on device.*free up space"):
        write_presized(own, "refshapes", "val", rows, transform, progress=False)
    monkeypatch.setattr(os, "posix_fallocate", lambda *_: (_ for _ in ()).throw(OSError(errno.EOPNOTSUPP, "no")))
    assert write_presized(own, "refshapes", "val", rows, transform, progress=False).is_dir()


def test_a_cache_written_again_while_loaders_start_is_named(own: str) -> None:
    rows, transform = open_rows(own, "refshapes", "val"), ImageTransform(24, "square", "clip")
    folder = write_presized(own, "refshapes", "val", rows, transform, progress=False)
    travelling = pickle.dumps(open_presized(own, "refshapes", "val", transform))
    content = json.loads((folder / "presized.json").read_text())
    (folder / "presized.json").write_text(json.dumps({**content, "source": "another"}))
    with pytest.raises(UserError, match="was written again while this run was starting"):
        pickle.loads(travelling)
