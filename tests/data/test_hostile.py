"""Files from people who mean harm, and files that were damaged: rejected or counted in one sentence, never believed."""

import json
import os
import pickle
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from amltrain.data.catalog import read_manifest
from amltrain.data.images import FileFault, path_below, read_image_file
from amltrain.data.prepare import prepare
from amltrain.data.rows import hash_file, open_rows
from amltrain.data.segmentation import BrokenSegmentationError, decode_mask, referent_mask
from amltrain.errors import UserError
from tests.data.original import HEIGHT, WIDTH, Original


@pytest.mark.parametrize(
    ("segmentation", "size", "why"),
    [
        ([[0, 0, 9, 0, 9, 9]], (10**9, 10**9), "cannot be"),
        ({"size": [10**9, 10**9], "counts": [10**18]}, (10**9, 10**9), "cannot be"),
        ({"size": [10**9, 10**9], "counts": [10**18]}, (HEIGHT, WIDTH), "are for size"),
        ({"size": list(range(10**5)), "counts": [1]}, (HEIGHT, WIDTH), "are for size"),
        ({"size": [HEIGHT, WIDTH], "counts": "o" * 10**6}, (HEIGHT, WIDTH), "never ends"),
        ({"size": [HEIGHT, WIDTH], "counts": "0" * 10**5}, (HEIGHT, WIDTH), "do not add up"),
        ({"size": [HEIGHT, WIDTH], "counts": [0] * 10**6 + [HEIGHT * WIDTH]}, (HEIGHT, WIDTH), "do not add up"),
        ({"size": [HEIGHT, WIDTH], "counts": [2**70, -(2**70) + HEIGHT * WIDTH]}, (HEIGHT, WIDTH), "do not add up"),
        ({"size": [HEIGHT, WIDTH], "counts": {"a": 1}}, (HEIGHT, WIDTH), "no counts"),
        ([[0, 0, 9000, 0, 9000, 9000] * 2000], (9000, 9000), "outline is longer"),
        ([[0, 0, 9, 0, 9, 9]] * 20_000, (HEIGHT, WIDTH), "more than 10,000 polygons"),
        ([[1, 2, 30, 4, 5, 26], None, 7], (HEIGHT, WIDTH), ""),
    ],
)  # fmt: skip
def test_masks_are_checked_before_they_are_decoded(segmentation: Any, size: tuple[int, int], why: str) -> None:
    start = time.monotonic()
    if why:
        with pytest.raises(BrokenSegmentationError, match=why):
            referent_mask([segmentation], *size)
    else:
        assert len(referent_mask([segmentation], *size).dropped) == 2
    assert time.monotonic() - start < 5


@pytest.mark.parametrize(
    "mask",
    [
        {"size": [3, 4], "counts": "garbage"}, {"size": [3, 4], "counts": None}, {"size": [3], "counts": "0"}, {},
        {"size": [-3, -4], "counts": [12]}, {"size": [10**6, 10**6], "counts": [10**12]}, {"size": ["a", 4]}, None,
    ],
)  # fmt: skip
def test_decode_mask_rejects_in_a_sentence(mask: Any) -> None:
    with pytest.raises(UserError, match="the mask cannot be decoded"):
        decode_mask(mask)


def test_paths_do_not_leave_the_folder(tmp_path: Path) -> None:
    root = tmp_path / "images"
    root.mkdir()
    (tmp_path / "secret.jpg").write_bytes(b"secret")
    (root / "link.jpg").symlink_to(tmp_path / "secret.jpg")
    (root / "inside.jpg").symlink_to(root / "real.jpg")
    (root / "circle.jpg").symlink_to(root / "circle.jpg")
    Image.new("RGB", (4, 3)).save(root / "real.jpg")
    os.mkfifo(root / "pipe.jpg")
    assert read_image_file(root, "inside.jpg").width == 4
    for name in ("../secret.jpg", "/etc/passwd", "a/../../secret.jpg", "..\\secret.jpg", "C:\\x.jpg", "", ".", "a\0b"):
        with pytest.raises(FileFault, match="leads outside"):
            path_below(root, name)
    for name, why in (
        ("link.jpg", "a link that leads outside"),
        ("pipe.jpg", "not a regular file"),
        ("circle.jpg", "cannot be re|missing"),
        ("x" * 5000, "cannot be re"),
        ("none.jpg", "the file is missing"),
    ):
        with pytest.raises(FileFault, match=why):
            read_image_file(root, name)


def spoil_image(path: Path, kind: str) -> None:
    if kind == "bomb":
        header = b"P6 60000 60000 255\n"
        path.write_bytes(header + bytes(100))
    elif kind == "float":
        Image.fromarray(np.zeros((HEIGHT, WIDTH), np.float32)).save(path, "TIFF")
    elif kind == "text":
        path.write_text("<html>404</html>")
    elif kind == "pipe":
        path.unlink()
        os.mkfifo(path)
    elif kind == "empty":
        path.write_bytes(b"")
    else:
        path.write_bytes(path.read_bytes()[:300])


@pytest.mark.parametrize("kind", ["bomb", "float", "text", "pipe", "empty", "cut"])
def test_one_bad_image_is_skipped_and_counted(kind: str, tmp_path: Path) -> None:
    original = Original(tmp_path).write()
    spoil_image(original.image_file(1), kind)
    manifest = prepare("refcoco", tmp_path, tmp_path / "prepared", max_skipped=0.1, progress=False)
    (entry,) = manifest["skipped"]
    assert entry["what"] == "image COCO_train2014_000000000002.jpg with 1 refs" and entry["expressions"] == 2
    assert manifest["splits"]["train"]["images"] == 2


def test_a_secret_beside_the_images_is_not_embedded(tmp_path: Path) -> None:
    original = Original(tmp_path).write()
    Image.new("RGB", (WIDTH, HEIGHT), "red").save(tmp_path / "secret.jpg")
    original.images[1]["file_name"] = "../../../../secret.jpg"
    (original.folder / "instances.json").write_text(
        json.dumps({"images": original.images, "annotations": original.annotations, "categories": []})
    )
    with pytest.raises(UserError, match=r"secret\.jpg' leads outside"):
        prepare("refcoco", tmp_path, tmp_path / "prepared", progress=False)


@pytest.mark.parametrize(
    ("key", "value"),
    [("raw", "x" * 20_000), ("raw", "\ud800"), ("sent", "\ud800x")],
)
def test_a_sentence_that_is_no_text_is_counted(key: str, value: str, tmp_path: Path) -> None:
    original = Original(tmp_path).write()
    original.refs[1]["sentences"][0][key] = value
    (original.folder / "refs(unc).json").write_text(json.dumps(original.refs))
    original.refs_file.unlink()
    manifest = prepare("refcoco", tmp_path, tmp_path / "prepared", max_skipped=0.1, progress=False)
    assert [entry["expressions"] for entry in manifest["skipped"]] == [1]


@pytest.mark.parametrize("content", ["[" * 100_000, '{"images": ' + "9" * 5000 + "}", '"\\ud800"', "\x00", "[1e999]"])
def test_hostile_json_is_rejected_in_a_sentence(content: str, tmp_path: Path) -> None:
    original = Original(tmp_path).write()
    (original.folder / "instances.json").write_text(content)
    with pytest.raises(UserError, match=r"instances\.json (is damaged|has no list)"):
        prepare("refcoco", tmp_path, tmp_path / "prepared", progress=False)


@pytest.mark.parametrize("entry", [None, 3, [], {"ref_id": True}, {"ref_id": 1, "image_id": 1.5}])
def test_hostile_refs_are_rejected_in_a_sentence(entry: Any, tmp_path: Path) -> None:
    original = Original(tmp_path).write()
    original.refs_file.write_bytes(pickle.dumps([original.refs[0], entry]))
    with pytest.raises(UserError, match=r"refs\(unc\)\.p: ref number 1 has"):
        prepare("refcoco", tmp_path, tmp_path / "prepared", progress=False)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("whole")
    prepare("refcoco", Original(root, per_split=4).write().root, root / "prepared", progress=False)
    return root / "prepared"


@pytest.mark.parametrize("streaming", [False, True])
def test_flipped_bits_are_noticed(streaming: bool, whole: Path, tmp_path: Path) -> None:
    """A bit of any byte of a prepared file: an error, or exactly the same rows (padding that nobody reads)."""
    (source,) = (whole / "refcoco").glob("val-*")
    content = source.read_bytes()
    folder = tmp_path / "refcoco"
    folder.mkdir()
    (folder / "manifest.json").write_bytes((whole / "refcoco/manifest.json").read_bytes())
    truth = read_all(str(whole), streaming)
    noticed = same = 0
    generator = np.random.default_rng(0)
    for place in generator.integers(0, len(content), 60 if streaming else 10):
        flipped = content[:place] + bytes([content[place] ^ 1 << int(generator.integers(8))]) + content[place + 1 :]
        (folder / source.name).write_bytes(flipped)
        try:
            assert read_all(str(tmp_path), streaming) == truth, f"byte {place} changed the rows silently"
            same += 1
        except UserError as error:
            noticed += "damaged" in str(error) or "could not read" in str(error)
    assert noticed == (60 if streaming else 10) - same and noticed > 5 * same and (streaming or same == 0)


def read_all(prepared: str, streaming: bool) -> list[Any]:
    rows = open_rows(prepared, "refcoco", "val", streaming=streaming)
    images = [rows.image_bytes(row) for row in range(len(rows))]
    return [images, *(rows.columns.column(name).to_pylist() for name in ("image_id", "height", "referents"))]


def test_data_prepared_before_there_were_hashes_is_read(whole: Path, tmp_path: Path) -> None:
    manifest = read_manifest(whole / "refcoco")
    assert manifest["files"].keys() == {path.name for path in (whole / "refcoco").glob("*.parquet")}
    (shard,) = (whole / "refcoco").glob("val-*")
    assert manifest["files"][shard.name] == hash_file(shard)._asdict()
    (tmp_path / "refcoco").mkdir()
    (tmp_path / "refcoco" / shard.name).write_bytes(shard.read_bytes())
    del manifest["files"], manifest["spec"]
    (tmp_path / "refcoco/manifest.json").write_text(json.dumps(manifest))
    for streaming in (False, True):
        assert len(open_rows(str(tmp_path), "refcoco", "val", streaming=streaming)) == 4


def test_a_full_cache_and_an_empty_split_give_the_right_advice(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    (tmp_path / "file").write_text("")
    cache = tmp_path / "cache"
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)

    def no_room(self: Any, *_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(datasets.DatasetBuilder, "download_and_prepare", no_room)
        with pytest.raises(UserError, match=r"could not write the memory-mapped copy .* set data\.streaming true") as e:
            open_rows(str(whole), "refcoco", "val")
        assert "remove" not in str(e.value)
    original = Original(tmp_path)
    original.refs = [ref for ref in original.refs if ref["split"] != "testB"]
    prepare("refcoco", original.write().root, tmp_path / "prepared", progress=False)
    with pytest.raises(UserError, match="split testB of refcoco has no rows; choose another split") as error:
        open_rows(str(tmp_path / "prepared"), "refcoco", "testB")
    assert "remove" not in str(error.value)


def test_the_output_does_not_depend_on_the_number_of_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from amltrain.data import prepare as module

    monkeypatch.setattr(module, "IMAGES_PER_WORKER", 1)
    monkeypatch.setattr(module, "JOBS_PER_TASK", 2)
    original = Original(tmp_path, per_split=9)
    original.annotations[4]["segmentation"] = [[1, 2, 3]]
    original.write()
    for workers in (1, 3):
        options = {"max_skipped": 0.1, "workers": workers, "progress": False}
        prepare("refcoco", tmp_path, tmp_path / str(workers) / "out", **options)
    for path in (tmp_path / "1").rglob("*"):
        if path.is_file() and not path.name.endswith(".lock"):
            assert path.read_bytes() == (tmp_path / "3" / path.relative_to(tmp_path / "1")).read_bytes(), path.name
