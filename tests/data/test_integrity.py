"""A data set's contents have one fingerprint; presized images are written once and every fault in them is found."""

import json
import multiprocessing
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from amltrain.checkpoints.resume import Progress
from amltrain.config.schema import DataConfig, Preprocess
from amltrain.data.cache import PresizedImages, checksum, open_presized, write_presized
from amltrain.data.catalog import fingerprint, read_manifest
from amltrain.data.dataset import OpenSplit, ReferDataset
from amltrain.data.loaders import build_train_dataset
from amltrain.data.prepare import prepare
from amltrain.data.rows import open_rows
from amltrain.data.sources.shapes import write_refshapes
from amltrain.data.transforms import ImageTransform
from amltrain.errors import UserError
from tests.data.stand_in import word_tokenizer

SIZES = {"train": 12, "val": 3, "testA": 2, "testB": 2}


def make(root: Path, seed: int = 0) -> str:
    write_refshapes(root / "source", split_sizes=SIZES, size=32, seed=seed, progress=False)
    prepare("refshapes", root / "source", root / "prepared", progress=False)
    return str(root / "prepared")


def contents(prepared: str, split: str = "train") -> str:
    return fingerprint(read_manifest(Path(prepared) / "refshapes"), split)


def dataset(prepared: str, **options: object) -> ReferDataset:
    data = DataConfig(prepared=prepared, datasets=["refshapes"], streaming=True, presized=False)
    preprocess = Preprocess(
        size=32, resize="square", normalization="imagenet", tokenizer="wordpiece", max_tokens=12, sentence_field="sent"
    )
    opened = build_train_dataset(data, preprocess, word_tokenizer(), mask_parts="union", seed=0).splits
    return ReferDataset(opened, ImageTransform(32), word_tokenizer(), **options)


def test_the_fingerprint_is_that_of_the_contents(tmp_path: Path) -> None:
    one, again = make(tmp_path / "one"), make(tmp_path / "elsewhere/again")
    other = make(tmp_path / "other", seed=1)
    assert len(contents(one)) == 64 and contents(one) == contents(again) != contents(other)
    assert contents(one) != contents(one, "val")
    shutil.move(one, tmp_path / "moved")
    assert contents(str(tmp_path / "moved")) == contents(again)
    assert fingerprint({"files": {}}, "train") == fingerprint(None, "train") == ""


def test_other_samples_of_the_same_data_are_others(tmp_path: Path) -> None:
    prepared = make(tmp_path)
    whole = dataset(prepared)
    assert whole.fingerprint == dataset(prepared).fingerprint != ""
    assert whole.fingerprint != dataset(prepared, unit="referent").fingerprint
    image = int(whole.referent_images[0])
    assert whole.fingerprint != dataset(prepared, excluded_images={image}).fingerprint
    unknown = OpenSplit("refshapes", "train", open_rows(prepared, "refshapes", "train", streaming=True))
    assert ReferDataset([unknown], ImageTransform(32), word_tokenizer()).fingerprint == ""


def test_a_run_is_not_continued_on_other_data_of_as_many_samples() -> None:
    saved = Progress(step=3, spread=[1, 2, 1], samples=10, data="a" * 64).state_dict()
    with pytest.raises(UserError, match=r"was made from other training data of as many samples; .*new run"):
        Progress(spread=[1, 2, 1], samples=10, data="b" * 64).resumed(saved, "step_3")
    assert Progress(spread=[2, 1, 1], samples=10, data="a" * 64).resumed(saved, "step_3").step == 3
    older = {key: value for key, value in saved.items() if key != "data"}
    resumed = Progress(spread=[1, 2, 1], samples=10, data="b" * 64).resumed(older, "step_3")
    assert resumed.data == "b" * 64  # known from the next checkpoint on


@pytest.fixture(scope="module")
def presized(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    prepared = make(tmp_path_factory.mktemp("presized"))
    rows = open_rows(prepared, "refshapes", "train", streaming=True)
    return prepared, write_presized(prepared, "refshapes", "train", rows, ImageTransform(32), progress=False)


def read_all(folder: Path) -> list[torch.Tensor]:
    images = PresizedImages(folder)
    return [part for row in range(len(images)) for part in (images.image(row), images.target(row, 0))]


def flip(path: Path, place: float) -> None:
    content = bytearray(path.read_bytes())
    content[int(place * (len(content) - 1))] ^= 4
    path.write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def blank(path: Path) -> None:
    """The tail of a file that a crash left unwritten: as long as it should be, and zero."""
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2] + bytes(len(content) - len(content) // 2))


def swap(path: Path) -> None:
    """Two images exchanged, as by a wrong index."""
    images = np.load(path)
    images[[0, 1]] = images[[1, 0]]
    np.save(path, images)


FAULTS: list[tuple[str, str, Callable[[Path], None]]] = [
    *(
        (f"a bit of the images at {place}", "images.npy", lambda p, place=place: flip(p, place))
        for place in (0.1, 0.5, 1)
    ),
    ("images cut off", "images.npy", cut),
    ("half of the images black", "images.npy", blank),
    ("two images exchanged", "images.npy", swap),
    *(
        (f"a bit of {name}", f"{name}.npy", lambda p: flip(p, 0.9))
        for name in ("values", "starts", "first_run", "first_target", "sums")
    ),
    ("a file cut off", "starts.npy", cut),
    ("a file that is missing", "first_run.npy", lambda path: path.unlink()),
    ("the settings without hashes", "presized.json", lambda path: path.write_text('{"format": 2}')),
]


@pytest.mark.parametrize(("name", "file", "fault"), FAULTS, ids=[name for name, *_ in FAULTS])
def test_every_fault_of_the_cache_is_found(
    name: str, file: str, fault: Callable[[Path], None], presized: tuple[str, Path], tmp_path: Path
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(presized[1], folder)
    assert read_all(folder)
    fault(folder / file)
    with pytest.raises(UserError, match=r"is damaged .*write it again with amltrain data presize"):
        read_all(folder)


def test_another_data_sets_images_are_not_taken(presized: tuple[str, Path], tmp_path: Path) -> None:
    other = make(tmp_path, seed=1)
    target = Path(other) / "refshapes" / presized[1].relative_to(Path(presized[0]) / "refshapes")
    shutil.copytree(presized[1], target)
    assert open_presized(other, "refshapes", "train", ImageTransform(32)) is None


def test_a_checksum_sees_every_bit() -> None:
    generator = np.random.default_rng(0)
    for shape in ((3, 5, 5), (3, 8, 8), (3, 1, 1)):
        image = generator.integers(0, 255, shape, dtype=np.uint8)
        whole = checksum(image)
        for place in range(image.size):
            for bit in (1, 128):
                changed = image.copy()
                changed.reshape(-1)[place] ^= bit
                assert checksum(changed) != whole


def _write(prepared: str, queue: "multiprocessing.Queue[int]") -> None:
    rows = open_rows(prepared, "refshapes", "train", streaming=True)
    folder = write_presized(prepared, "refshapes", "train", rows, ImageTransform(32), progress=False, workers=1)
    queue.put((folder / "images.npy").stat().st_ino)


def test_one_of_several_processes_writes_and_the_others_wait(tmp_path: Path) -> None:
    prepared = make(tmp_path)
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    processes = [context.Process(target=_write, args=(prepared, queue)) for _ in range(4)]
    for process in processes:
        process.start()
    inodes = {queue.get(timeout=120) for _ in processes}
    for process in processes:
        process.join(60)
    assert len(inodes) == 1  # one file, written once
    opened = open_presized(prepared, "refshapes", "train", ImageTransform(32))
    assert opened is not None and all(opened.image(row).any() for row in range(len(opened)))
    left = [path.name for path in opened.folder.parent.iterdir() if "partial" in path.name]
    assert left == [] and json.loads((opened.folder / "presized.json").read_text())["files"]


def test_results_and_the_model_keep_the_fingerprint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from accelerate.state import AcceleratorState, GradientState, PartialState

    from amltrain.commands.evaluate import main as evaluate
    from amltrain.commands.train import main as train

    monkeypatch.chdir(tmp_path)
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
    prepared = make(tmp_path)
    shapes = ["--data.shapes.train", "12", "--data.shapes.evaluation", "2", "--data.shapes.size", "32"]
    data = ["--data.datasets", "[refshapes]", "--data.prepared", prepared, "--data.workers", "0"]
    monkeypatch.setattr("amltrain.training.build.check_scenes", lambda _: None)  # of val these are 3
    train([
        "--config", "quickstart", *data, *shapes, "--method", "supervised", "--train.max_steps", "1",
        "--train.global_batch_size", "2", "--tracking.trackers", "[]", "--evaluation.pictures", "0",
        "--evaluation.max_samples", "2", "--output", "run",
    ])  # fmt: skip
    record = json.loads((tmp_path / "run/best/model/training.json").read_text())
    state = next((tmp_path / "run").rglob("trainer.json"))
    assert record["data_fingerprint"] == json.loads(state.read_text())["data"] != ""
    named = ["--data.datasets", "[refshapes]", "--data.prepared", prepared, "--splits", "val"]
    evaluate(["--checkpoint", "run/best", *named, "--pictures", "0", "--output", "scored"])
    (row,) = json.loads((tmp_path / "scored/results.json").read_text())["results"]
    assert len(row["provenance"]["data_fingerprint"]) == 64
