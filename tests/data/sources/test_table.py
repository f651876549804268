"""Own data: every form of table and mask gives the same rows; what is wrong is named with its row."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from pycocotools import mask as coco

from amltrain.commands.prepare import main
from amltrain.commands.presize import main as presize
from amltrain.config.schema import DataConfig
from amltrain.data.catalog import find_spec, read_manifest
from amltrain.data.rows import open_rows
from amltrain.data.segmentation import decode_mask
from amltrain.data.sources.own import assign_splits
from amltrain.inference.evaluate import evaluation_splits

HEIGHT, WIDTH = 30, 40
BOX = [5, 6, 20, 10]
POLYGON = [5, 6, 25, 6, 25, 16, 5, 16]


def square() -> np.ndarray:
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    mask[6:16, 5:25] = 1
    return mask


def run_lengths() -> dict[str, Any]:
    rle = coco.encode(np.asfortranarray(square()))
    return {"size": [HEIGHT, WIDTH], "counts": rle["counts"].decode()}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three pictures in `photos`, their masks in `photos/masks`."""
    (tmp_path / "photos" / "masks").mkdir(parents=True)
    for number in range(3):
        Image.new("RGB", (WIDTH, HEIGHT), (80 * number, 20, 30)).save(tmp_path / "photos" / f"{number}.jpg")
        Image.fromarray(square() * np.uint8(255)).save(tmp_path / "photos" / "masks" / f"{number}.png")
    return tmp_path


def write(table: Path, rows: list[dict[str, Any]]) -> Path:
    if table.suffix == ".jsonl":
        table.write_text("\n".join(map(json.dumps, rows)))
    elif table.suffix == ".json":
        table.write_text(json.dumps(rows))
    elif table.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), table)
    else:
        lines = [list(rows[0])] + [
            [v if isinstance(v, str) else json.dumps(v) if v is not None else "" for v in row.values()] for row in rows
        ]
        table.write_text("\n".join(",".join('"' + cell.replace('"', '""') + '"' for cell in line) for line in lines))
    return table


def run(folder: Path, *options: str, table: Path | None = None) -> Path:
    source = ["--table", str(table), "--images", str(folder / "photos")] if table else []
    main([*source, "--name", "mine", "--output", str(folder / "prepared"), "--workers", "1", *options])
    return folder / "prepared"


def referents(prepared: Path, split: str) -> list[dict[str, Any]]:
    rows = open_rows(str(prepared), "mine", split, streaming=True)
    return [referent for row in rows.columns.column("referents").to_pylist() for referent in row]


MASKS: list[tuple[str, Callable[[int], Any]]] = [
    ("png", lambda number: f"masks/{number}.png"),
    ("rle", lambda number: run_lengths()),
    ("polygons", lambda number: [POLYGON]),
    ("polygon", lambda number: POLYGON),
    ("points", lambda number: [POLYGON[i : i + 2] for i in range(0, 8, 2)]),
    ("box", lambda number: BOX),
]


@pytest.mark.parametrize("ending", [".jsonl", ".json", ".csv", ".tsv", ".parquet"])
@pytest.mark.parametrize(("kind", "mask"), MASKS)
def test_every_form_gives_the_same_mask(ending: str, kind: str, mask: Callable[[int], Any], folder: Path) -> None:
    rows = [
        {"image": f"{number}.jpg", "sentence": f"The Square, {number}", "mask": mask(number), "split": split}
        for number, split in enumerate(("train", "val", "test"))
    ]
    table = write(folder / f"my{'.csv' if ending == '.tsv' else ending}", rows)
    if ending == ".tsv":
        table = write_tsv(folder / "my.tsv", rows)
    prepared = run(folder, table=table)
    assert find_spec("mine", str(prepared)).splits == ("train", "val", "test")
    for number, split in enumerate(("train", "val", "test")):
        (referent,) = referents(prepared, split)
        assert np.array_equal(decode_mask(referent["mask"]), square()), kind
        assert [s["raw"] for s in referent["sentences"]] == [f"The Square, {number}"]
        assert [s["sent"] for s in referent["sentences"]] == [f"the square, {number}"]


def write_tsv(path: Path, rows: list[dict[str, Any]]) -> Path:
    cell = [[v if isinstance(v, str) else json.dumps(v) for v in row.values()] for row in rows]
    path.write_text("\n".join("\t".join(line) for line in [list(rows[0]), *cell]))
    return path


def test_nothing_there_several_sentences_and_ids(folder: Path) -> None:
    rows = [
        {"image": "0.jpg", "sentences": ["a", "b"], "box": BOX, "split": "train", "ref_id": 7, "category": "car"},
        {"image": "0.jpg", "sentences": ["c"], "box": BOX, "split": "train", "ref_id": 7, "category": "car"},
        {"image": "0.jpg", "sentences": ["a cat"], "split": "train", "no_target": True},
        {"image": "1.jpg", "sentences": ["e"], "box": BOX, "split": "dev"},
    ]
    prepared = run(folder, table=write(folder / "my.jsonl", rows))
    there, absent = referents(prepared, "train")
    assert (there["ref_id"], there["category"], there["bbox"]) == (7, "car", [5, 6, 20, 10])
    assert [s["raw"] for s in there["sentences"]] == ["a", "b", "c"]
    assert absent["no_target"] and not decode_mask(absent["mask"]).any()
    manifest = read_manifest(prepared / "mine")
    assert (
        manifest["published"] == {} and manifest["spec"]["generalised"] and manifest["notes"] == ["3 masks are boxes"]
    )


def test_coco_style_json(folder: Path) -> None:
    content = {
        "images": [{"id": 4, "file_name": "0.jpg", "split": "train"}, {"id": 5, "file_name": "1.jpg", "split": "val"}],
        "annotations": [
            {"id": 1, "image_id": 4, "category_id": 2, "segmentation": [POLYGON], "bbox": BOX, "sentences": ["x", "y"]},
            {"id": 2, "image_id": 5, "category_id": 2, "segmentation": run_lengths(), "caption": "z"},
        ],
        "categories": [{"id": 2, "name": "square"}],
    }
    (folder / "coco.json").write_text(json.dumps(content))
    prepared = run(folder, table=folder / "coco.json")
    assert open_rows(str(prepared), "mine", "train", streaming=True).columns.column("image_id").to_pylist() == [4]
    (referent,) = referents(prepared, "val")
    assert referent["category"] == "square" and np.array_equal(decode_mask(referent["mask"]), square())


@pytest.mark.parametrize("layout", ["side by side", "in folders"])
def test_a_folder_of_files(layout: str, folder: Path) -> None:
    for number, split in enumerate(("train", "train", "val")):
        base = folder / "files" / split
        names = (f"{number}.jpg", f"{number}_mask.png", f"{number}.txt")
        if layout == "in folders":
            names = (f"images/{number}.jpg", f"masks/{number}.png", f"texts/{number}.txt")
        for name in names:
            (base / name).parent.mkdir(parents=True, exist_ok=True)
        (base / names[0]).write_bytes((folder / "photos" / f"{number}.jpg").read_bytes())
        (base / names[1]).write_bytes((folder / "photos/masks" / f"{number}.png").read_bytes())
        (base / names[2]).write_text("a square\nthe thing\n")
    prepared = run(folder, "--folder", str(folder / "files"))
    assert len(referents(prepared, "train")) == 2
    assert [s["raw"] for s in referents(prepared, "val")[0]["sentences"]] == ["a square", "the thing"]


def test_a_data_set_that_datasets_reads(folder: Path) -> None:
    """Pictures and masks inside Parquet, under other column names; both columns become files."""
    rows = {
        "photo": [str(folder / "photos" / f"{n}.jpg") for n in range(3)],
        "what": ["one", "two", "three"],
        "label_mask": [str(folder / "photos/masks" / f"{n}.png") for n in range(3)],
    }
    columns = datasets.Features(
        {"photo": datasets.Image(), "what": datasets.Value("string"), "label_mask": datasets.Image()}
    )
    (folder / "hf").mkdir()
    datasets.Dataset.from_dict(rows, features=columns).to_parquet(folder / "hf" / "train.parquet")
    named = ["--columns", "image=photo", "sentence=what", "mask=label_mask"]
    prepared = run(folder, "--hf", str(folder / "hf"), *named)
    found = [referents(prepared, split)[0] for split in ("train", "val", "test")]
    assert {r["sentences"][0]["raw"] for r in found} == {"one", "two", "three"}
    assert all(np.array_equal(decode_mask(r["mask"]), square()) for r in found)
    assert "few images (3), 1 of them in train" in read_manifest(prepared / "mine")["notes"][-1]


def test_splits_are_a_function_of_name_and_seed() -> None:
    names = [f"{n}.jpg" for n in range(1000)]
    shares = {"train": 0.8, "val": 0.1, "test": 0.1}
    first = assign_splits(names, 0, shares)
    assert first == {**assign_splits(reversed(names), 0, shares)} != assign_splits(names, 1, shares)
    more = assign_splits([*names, "further.jpg"], 0, shares)
    assert {name: more[name] for name in names} == first
    assert 750 < sum(split == "train" for split in first.values()) < 850
    for few in range(1, 8):
        for seed in range(20):
            assert set(assign_splits(names[:few], seed, shares).values()) == set(list(shares)[:few])


GOOD = {"image": "0.jpg", "sentence": "x", "mask": "masks/0.png"}


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ([{"picture": "0.jpg", "sentence": "x"}], (), "has no column 'image'; it has picture, sentence"),
        ([{"image": "0.jpg", "words": "x"}], (), "has no column 'sentence'; it has image, words"),
        ([{"image": "0.jpg", "sentence": "x"}], (), "has no column 'mask' or 'box'; it has image, sentence"),
        ([GOOD], ("--columns", "image=photo"), "has no column 'photo'; it has image, sentence, mask"),
        ([GOOD], ("--columns", "imag=photo"), "--columns imag: the columns are image, sentence"),
        ([GOOD], ("--columns", "photo"), "--columns 'photo' should look like image=photo"),
        ([GOOD, GOOD | {"mask": None}], (), "my.jsonl, row 2: the mask is empty; where the sentence refers to nothing"),
        ([GOOD | {"no_target": True}], (), "row 1: no_target is true, but there is a mask"),
        ([GOOD | {"no_target": "maybe"}], (), "row 1: no_target is 'maybe', not true or false"),
        ([GOOD | {"sentence": 3}], (), "row 1: the sentence is '3', not a text"),
        ([GOOD | {"sentence": ""}], (), "row 1 of image 0.jpg: it is empty"),
        ([GOOD | {"sentence": None}, GOOD], (), "row 1 of image 0.jpg: it is empty"),
        ([GOOD | {"mask": [5, 6, -3, 10]}], (), r"row 1: the box \[5, 6, -3, 10\] has no width or no height"),
        ([GOOD | {"ref_id": "7.5"}], (), "row 1: ref_id is '7.5', not a whole number"),
        ([GOOD | {"ref_id": 2**70}], (), "row 1: ref_id needs more than 64 bits"),
        ([GOOD | {"split": True}], (), "row 1: the split is True, not a text"),
        ([GOOD | {"category": [["cup"]]}], (), r"row 1: the category is \[\['cup'\]\], not a text"),
        ([GOOD | {"mask": {"size": [HEIGHT, WIDTH], "counts": [True, HEIGHT * WIDTH - 1]}}], (), "do not add up"),
        ([GOOD | {"image": None}], (), "row 1: the image is None, not a path"),
        ([GOOD | {"split": "train"}, GOOD | {"image": "1.jpg"}], (), "row 2: no split, but other rows have one"),
        ([GOOD | {"split": "my split"}], (), "the split 'my split' should be letters, digits and _ only"),
        ([GOOD | {"ref_id": 1}, GOOD | {"ref_id": 1, "mask": "masks/1.png"}], (), "ref 1 of image 0.jpg has two"),
        ([GOOD], ("--name", "refcoco"), "'refcoco' is the name of a published data set"),
        ([GOOD], ("--name", "../x"), "--name '../x' should be letters"),
        ([GOOD], ("--split_shares", "train=0.5"), "should be above 0 and add up to 1"),
        ([GOOD], ("--split_shares", "train=a"), "--split_shares: could not convert"),
        ([GOOD | {"image": "../my.jsonl"}], (), "leads outside"),
        ([GOOD | {"image": "/etc/passwd"}], (), "leads outside"),
        ([GOOD | {"image": "9.jpg"}], (), "image 9.jpg with 1 refs: the file is missing in"),
        ([GOOD | {"mask": "masks/9.png"}], (), "row 1 of image 0.jpg: mask masks/9.png: the file is missing in photos"),
        ([GOOD | {"mask": "0.jpg"}], (), "it is a JPEG, whose pixel values are not exact"),
        ([GOOD | {"mask": "masks/grey.png"}], (), "values 1, 2 beside 0; give --mask_threshold, or"),
        ([GOOD | {"mask": "masks/small.png"}], (), r"mask masks/small.png: its mask is for size \[4, 4\], the picture"),
        ([GOOD | {"mask": {"size": [4, 4], "counts": [8, 8]}}], (), r"its mask is for size \[4, 4\]"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(
    rows: list[dict[str, Any]],
    options: tuple[str, ...],
    message: str,
    folder: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    grey = np.zeros((HEIGHT, WIDTH), np.uint8)
    grey[0, :2] = 1, 2
    Image.fromarray(grey).save(folder / "photos/masks/grey.png")
    Image.fromarray(square()[:4, :4]).save(folder / "photos/masks/small.png")
    rows = [*rows, GOOD | {"image": "2.jpg"}] if "9.jpg" in message or "outside" in message else rows
    table = write(folder / "my.jsonl", rows)
    with pytest.raises(SystemExit) as stop:
        run(folder, *options, table=table)
    assert stop.value.code == 2
    (said,) = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert re.search(message, said), said
    assert not list((folder / "prepared").glob("mine*"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"image/sentence/mask\n0.jpg/x/masks-0.png\n", "has no column 'image'; it has image/sentence/mask"),
        (b'image,sentence,mask\n0.jpg,"stop" sign,masks/0.png\n', "line 2 cannot be read as csv .*write quotes inside"),
        (
            b'image,sentence,mask\n0.jpg,"a,masks/0.png\n1.jpg,b",masks/1.png\n',
            "line 3: the cell 'a,masks.* several rows",
        ),
        (b"image,mask,mask\n", "has the column 'mask' twice"),
        (b"image,sentence,mask\n0.jpg,x,masks/0.png\n\x81,y,z\n", "line 3 is not UTF-8"),
        (b"image,sentence,mask\n0.jpg,x,[5,6,20,10]\n", "Expected 3 columns, got 6.*; put cells that hold commas in"),
        (
            "image,sentence,mask\n0.jpg,caf\xe9,masks/0.png\n".encode("latin-1"),
            "line 2 is not UTF-8; .*--encoding cp1252",
        ),
        (
            "image,sentence,mask\n".encode("utf-16-le"),
            "UTF-16 without a byte-order mark; name it: --encoding utf-16-le",
        ),
    ],
)
def test_what_spreadsheets_write(
    content: bytes, message: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "my.csv").write_bytes(content)
    with pytest.raises(SystemExit):
        run(folder, table=folder / "my.csv")
    assert re.search(message, capsys.readouterr().err)


def test_a_manifest_names_no_folder_of_this_disk(folder: Path) -> None:
    """It is pushed with the data."""
    bad = ({"image": "9.jpg"}, {"image": str(folder / "secret.jpg")}, {"image": "1.jpg", "mask": "masks/9.png"})
    table = write(folder / "my.jsonl", [GOOD, *(GOOD | change for change in bad)])
    manifest = run(folder, "--max_skipped", "1", table=table) / "mine/manifest.json"
    assert len(json.loads(manifest.read_text())["skipped"]) == 3
    assert str(folder) not in manifest.read_text() and folder.name not in manifest.read_text()


def test_the_flag_to_correct_is_named(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = write(folder / "my.jsonl", [GOOD])
    with pytest.raises(SystemExit):
        run(folder, "--images", str(folder), table=table)
    assert "correct the table's paths or --images" in capsys.readouterr().err


def test_a_value_or_a_threshold_chooses_the_object(folder: Path) -> None:
    instances = square() * np.uint8(7)
    instances[20:25, :5] = 9
    Image.fromarray(instances).save(folder / "photos/masks/instances.png")
    row = {"image": "0.jpg", "sentence": "x", "mask": "masks/instances.png", "split": "train"}
    table = write(folder / "my.jsonl", [row | {"mask_value": 7}, row | {"mask_value": 9, "sentence": "y"}])
    first, second = referents(run(folder, table=table), "train")
    assert np.array_equal(decode_mask(first["mask"]), square()) and decode_mask(second["mask"]).sum() == 25


def test_what_looks_wrong_is_counted(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    full = np.ones((HEIGHT, WIDTH), np.uint8)
    Image.fromarray(full).save(folder / "photos/masks/full.png")
    rows = [
        {"image": "0.jpg", "sentences": ["Red", "red"], "mask": "masks/full.png", "ref_id": 1, "split": "train"},
        {"image": "0.jpg", "sentences": ["red"], "mask": "masks/full.png", "ref_id": 2, "split": "train"},
        {"image": "0.jpg", "sentences": ["b"], "mask": "masks/1.png", "ref_id": 3, "split": "val"},
        {"image": "1.jpg", "sentences": ["c"], "mask": [10, 10, 35, 25], "ref_id": 4, "split": "val"},
    ]
    manifest = read_manifest(run(folder, table=write(folder / "my.jsonl", rows)) / "mine")
    counts = {kind: noticed["count"] for kind, noticed in manifest["noticed"].items()}
    assert counts == {
        "referents with sentences that differ only in case": 1,
        "masks cover more than 95% of the image; are they inverted?": 2,
        "pairs of the same sentence and mask occur again in other refs": 1,
        "boxes reach beyond their image; are they x1, y1, x2, y2 instead of x, y, width, height?": 1,
    }
    said = capsys.readouterr().out
    assert "2 masks cover more than 95% of the image; are they inverted? (e.g. ref 1 of 0.jpg)" in said
    assert "1 images are in more than one split (e.g. 0.jpg)" in said
    with Image.open(folder / "prepared/mine/rows.jpg") as sheet:
        assert sheet.width > 260 and len(sheet.convert("RGB").getcolors(2**20)) > 10


def test_load_dataset_shows_every_split_and_pictures(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [GOOD | {"split": "train"}, GOOD | {"image": "1.jpg", "split": "val"}]
    prepared = run(folder, table=write(folder / "my.jsonl", rows))
    main(["--table", str(folder / "my.jsonl"), "--images", str(folder / "photos"), "--name", "also", "--output",
          str(prepared)])  # fmt: skip
    assert set(datasets.get_dataset_config_names(str(prepared))) == {"mine", "also"}
    found = datasets.load_dataset(str(prepared), "mine", cache_dir=str(folder / "cache"))
    assert set(found) == {"train", "val"}
    assert found["val"][0]["image"].size == (WIDTH, HEIGHT)
    assert np.array_equal(decode_mask(found["val"][0]["referents"][0]["mask"]), square())


def test_every_command_finds_the_splits_of_own_data(folder: Path) -> None:
    rows = [GOOD | {"image": f"{number}.jpg", "split": s} for number, s in enumerate(("train", "dev", "final"))]
    prepared = run(folder, table=write(folder / "my.jsonl", rows))
    data = DataConfig(datasets=["mine"], prepared=str(prepared))
    assert evaluation_splits(["all"], data) == ["mine:dev", "mine:final"]
    assert evaluation_splits(["final"], data) == ["final"]
    presize(["--prepared", str(prepared), "--dataset", "mine", "--size", "16", "--workers", "1"])
    assert sum(path.is_dir() for path in (prepared / "mine/presized").iterdir()) == 3


@pytest.mark.parametrize(
    ("splits", "command"),
    [
        (("train", "val", "test"), "see its report: amltrain finetune mine --prepared"),
        (("train",), "see its report: amltrain finetune mine --prepared"),
        (("test",), "score a model on it: amltrain evaluate --checkpoint RUN/best --data.datasets '[mine]'"),
    ],
)
def test_the_next_command_is_one_that_works(
    splits: tuple[str, ...], command: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [GOOD | {"image": f"{number}.jpg", "split": split} for number, split in enumerate(splits)]
    run(folder, table=write(folder / "my.jsonl", rows))
    said = capsys.readouterr().out
    assert command in said
