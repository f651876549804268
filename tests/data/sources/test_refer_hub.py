"""Annotations as they lie on the Hub (one row per referent, JSON inside) give what the original files give."""

import json
from pathlib import Path
from typing import Any

import datasets
import pytest
from datasets import Features, Sequence, Value

from amltrain.commands.prepare import main
from amltrain.data.catalog import read_manifest
from amltrain.data.rows import open_prepared
from amltrain.data.sources.annotations import Annotations
from amltrain.data.sources.refer import read_hub_schema, read_refer
from amltrain.errors import UserError
from tests.data.groups import image_groups
from tests.data.original import IMAGES, Original

HUB_SPLITS = {"train": "train", "val": "validation", "testA": "test", "testB": "testB", "test": "test"}
SCHEMA = Features(
    {
        "sent_ids": Sequence(Value("int64")),
        "file_name": Value("string"),
        "ann_id": Value("int64"),
        "ref_id": Value("int64"),
        "image_id": Value("int64"),
        "split": Value("string"),
        "sentences": [
            {"raw": Value("string"), "sent": Value("string"), "sent_id": Value("int64"),
             "tokens": Sequence(Value("string"))}
        ],
        "category_id": Value("int64"),
        "raw_anns": Value("string"),
        "raw_image_info": Value("string"),
        "raw_sentences": Value("string"),
        "image_path": Value("string"),
        "bbox": Sequence(Value("float64")),
        "captions": Sequence(Value("string")),
        "global_image_id": Value("string"),
        "anns_id": Value("string"),
    }
)  # fmt: skip


def hub_row(files: Annotations, ref: dict[str, Any]) -> dict[str, Any]:
    image, annotation = files.images[ref["image_id"]], files.annotations[ref["ann_id"]]
    x, y, width, height = annotation["bbox"]
    return {
        **{key: ref[key] for key in ("ann_id", "ref_id", "image_id", "split", "sentences")},
        "sent_ids": [sentence["sent_id"] for sentence in ref["sentences"]],
        "file_name": ref["file_name"],
        "category_id": annotation["category_id"],
        "raw_anns": json.dumps(annotation),
        "raw_image_info": json.dumps(image),
        "raw_sentences": json.dumps(ref["sentences"]),
        "image_path": f"coco/train2014/{image['file_name']}",
        "bbox": [x, y, x + width, y + height],
        "captions": [sentence["sent"] for sentence in ref["sentences"]],
        "global_image_id": f"coco.{ref['image_id']}",
        "anns_id": f"{files.name}.{ref['ann_id']}",
    }


def write_hub_folder(files: Annotations, folder: Path) -> Path:
    """The files of such a Hub data set, as `datasets` writes them."""
    for split in files.spec.splits:
        rows = [hub_row(files, ref) for ref in files.refs if ref["split"] == split]
        datasets.Dataset.from_list(rows, features=SCHEMA).to_parquet(
            folder / "data" / f"{HUB_SPLITS[split]}-00000-of-00001.parquet"
        )
    return folder


def everything(files: Annotations) -> list:
    return [group for split in files.spec.splits for group in image_groups(files, split)]


@pytest.mark.parametrize("dataset", ["refcoco", "refcocog"])
def test_the_same_referents_as_from_the_original_files(dataset: str, tmp_path: Path) -> None:
    original = read_refer(Original(tmp_path / "refer", dataset).write().root, dataset)
    hub = read_hub_schema(str(write_hub_folder(original, tmp_path / "hub")), dataset)
    assert everything(hub) == everything(original)
    assert hub.sources == read_hub_schema(str(tmp_path / "hub"), dataset).sources  # what was read, not where it lay


def test_real_annotations_joined_to_a_coco_folder(shared_dir: Path, tmp_path: Path) -> None:
    root = shared_dir / "data" / "refer_mini"
    files = read_refer(root, "refcoco")
    source = write_hub_folder(files, tmp_path / "hub")
    arguments = ["--dataset", "refcoco", "--image_root", str(root / IMAGES)]
    main([*arguments, "--hub", str(source), "--output", str(tmp_path / "from_hub")])
    main([*arguments, "--refer_root", str(root), "--output", str(tmp_path / "from_files")])
    for split in files.spec.splits:
        one, other = (list(open_prepared(str(tmp_path / f), "refcoco", split)) for f in ("from_hub", "from_files"))
        assert one == other
    manifest = read_manifest(tmp_path / "from_hub" / "refcoco")
    assert manifest["splits"]["train"]["refs"] == 37 and list(manifest["sources"]) == [source.name]


def spoilt(tmp_path: Path, **changes: Any) -> str:
    """A folder whose second training row has these values; None = without the column."""
    files = read_refer(Original(tmp_path / "refer").write().root, "refcoco")
    rows = [hub_row(files, ref) for ref in files.refs]
    rows[1] |= {key: value for key, value in changes.items() if value is not None}
    dropped = [key for key, value in changes.items() if value is None]
    table = datasets.Dataset.from_list(rows, features=SCHEMA).remove_columns(dropped)
    table.to_parquet(tmp_path / "hub" / "data" / "train-00000-of-00001.parquet")
    return str(tmp_path / "hub")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"raw_anns": None}, r"hub \(train\) has no column 'raw_anns'; .*as in jxu124/refcoco"),
        ({"raw_anns": '{"id": 1'}, "hub, row 1: raw_anns is no JSON"),
        ({"raw_anns": "[1]"}, "hub, row 1: raw_anns is no JSON object"),
        ({"raw_image_info": '{"id": 1, "height": 3}'}, "hub, row 1: image number 0 has no 'width'"),
        ({"image_path": ""}, "hub, row 1: image_path is empty"),
    ],
)
def test_damaged_rows_are_named(changes: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        read_hub_schema(spoilt(tmp_path, **changes), "refcoco")


def test_a_source_that_cannot_be_reached_is_named(tmp_path: Path) -> None:
    for source in ("nobody/nothing", str(tmp_path)):
        with pytest.raises(UserError, match=f"could not read {source} .*give a Hub data set id that can be reached"):
            read_hub_schema(source, "refcoco")
