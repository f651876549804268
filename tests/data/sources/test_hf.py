"""Data sets of `datasets`: masks as pictures, lists of pictures, arrays, bytes or run lengths give the same mask."""

import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from pycocotools import mask as coco

from amltrain.commands.prepare import main
from amltrain.data.rows import open_rows
from amltrain.data.segmentation import decode_mask
from tests.data.sources import writers

SIZE = (30, 40)
MASK = np.zeros(SIZE, np.uint8)
MASK[6:16, 5:25] = 1
UPPER, LOWER = MASK.copy(), MASK.copy()
UPPER[10:], LOWER[:10] = 0, 0


def picture_of(mask: np.ndarray) -> Any:
    from PIL import Image

    return Image.fromarray(mask * np.uint8(255))


def rle(mask: np.ndarray) -> dict[str, Any]:
    found = coco.encode(np.asfortranarray(mask))
    return {"size": list(SIZE), "counts": found["counts"].decode()}


FORMS: dict[str, tuple[Any, Any]] = {
    "a picture": (picture_of(MASK), datasets.Image()),
    "pictures of its parts": ([picture_of(UPPER), picture_of(LOWER)], datasets.List(datasets.Image())),
    "an array": (MASK, datasets.Array2D(SIZE, "uint8")),
    "an array of truth values": (MASK.astype(bool), datasets.Array2D(SIZE, "bool")),
    "nested lists": (MASK.tolist(), datasets.List(datasets.List(datasets.Value("uint8")))),
    "run lengths": (rle(MASK), {"size": datasets.List(datasets.Value("int64")), "counts": datasets.Value("string")}),
    "run lengths of its parts": (
        [rle(UPPER), rle(LOWER)],
        datasets.List({"size": datasets.List(datasets.Value("int64")), "counts": datasets.Value("string")}),
    ),
    "run lengths with bytes": (
        {**rle(MASK), "counts": rle(MASK)["counts"].encode()},
        {"size": datasets.List(datasets.Value("int64")), "counts": datasets.Value("binary")},
    ),
    "polygons": (
        [[5.0, 6.0, 25.0, 6.0, 25.0, 16.0, 5.0, 16.0]],
        datasets.List(datasets.List(datasets.Value("float64"))),
    ),
}


@pytest.mark.parametrize("form", list(FORMS))
def test_every_form_of_mask_is_the_same(form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    value, feature = FORMS[form]
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string"), "mask": feature})
    source = {"train": 2, "validation": 1}
    (tmp_path / "set/data").mkdir(parents=True)
    for split, count in source.items():
        rows = {
            "image": [writers.picture(SIZE, seed=count * 7 + i) for i in range(count)],
            "text": [f"the square of {split}"] * count,
            "mask": [value] * count,
        }
        datasets.Dataset.from_dict(rows, features=features).to_parquet(str(tmp_path / f"set/data/{split}-0.parquet"))
    main(["--hf", str(tmp_path / "set"), "--name", "mine", "--output", str(tmp_path / "p"), "--workers", "1"])
    counts = json.loads((tmp_path / "p/mine/manifest.json").read_text())["splits"]
    assert {split: entry["expressions"] for split, entry in counts.items()} == {"train": 2, "val": 1}
    for split in counts:
        column = open_rows(str(tmp_path / "p"), "mine", split, streaming=True).columns.column("referents")
        for (referent,) in column.to_pylist():
            assert np.array_equal(decode_mask(referent["mask"]), MASK)
