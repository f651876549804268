"""A made-up gRefCOCO tree, read by us and recorded from the official ReLA code: the same records, the same masks."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from pycocotools import mask as coco
from safetensors.torch import load_file

from amltrain.data.segmentation import decode_rle
from amltrain.data.sources.refer import read_refer
from amltrain.data.text import SentenceTokenizer
from amltrain.data.transforms import ImageTransform, normalise
from tests.data.groups import image_groups

SPLITS = ("train", "val", "testA", "testB")


@pytest.fixture(scope="module")
def fixture(shared_dir: Path) -> Path:
    return shared_dir / "goldens/rela/data_fixture"


@pytest.fixture(scope="module")
def expected(fixture: Path) -> dict[str, list[dict[str, Any]]]:
    return json.loads((fixture / "expected.json").read_text())["expected"]


def records(fixture: Path, split: str) -> dict[int, dict[str, Any]]:
    """Our reading, by sentence."""
    found = {}
    for group in image_groups(read_refer(fixture / "datasets", "grefcoco"), split):
        for referent in group.referents:
            for sentence in referent["sentences"]:
                found[sentence["sent_id"]] = {
                    "image": (group.image_id, group.file_name, group.height, group.width),
                    "ref_id": referent["ref_id"],
                    "raw": sentence["raw"],
                    "empty": referent["no_target"],
                    "mask": decode_rle(referent["mask"]),
                }
    return found


@pytest.mark.parametrize("split", SPLITS)
def test_records_and_masks(fixture: Path, expected: dict[str, list[dict[str, Any]]], split: str) -> None:
    ours = records(fixture, split)
    assert list(ours) == [record["sentence"]["sent_id"] for record in expected[split]]
    for record in expected[split]:
        mine = ours[record["sentence"]["sent_id"]]
        height, width = record["height"], record["width"]
        assert mine["image"] == (record["image_id"], record["file_name"], height, width)
        assert (mine["ref_id"], mine["raw"]) == (record["sentence"]["ref_id"], record["sentence"]["raw"])
        assert mine["empty"] == record["empty"]
        polygons = [p for annotation in record["annotations"] for p in annotation.get("segmentation", [])]
        merged = np.zeros((height, width), np.uint8)
        if polygons:
            merged = coco.decode(coco.merge(coco.frPyObjects(polygons, height, width)))
        assert np.array_equal(mine["mask"], merged)


@pytest.mark.parametrize("split", SPLITS)
def test_masks_at_network_size_differ_at_edges_only(
    fixture: Path, expected: dict[str, list[dict[str, Any]]], split: str
) -> None:
    """The official code draws polygons at 96 x 96; we draw them at the image's size and resize: borders differ."""
    drawn = load_file(fixture / "mapper_expected.safetensors")
    ours = records(fixture, split)
    for index, record in enumerate(expected[split]):
        truth = drawn[f"{split}.{index}.gt_mask_merged"].float()
        assert truth.sum() == record["gt_area"]
        mask = torch.from_numpy(ours[record["sentence"]["sent_id"]]["mask"]).float()
        resized = F.interpolate(mask[None, None], size=truth.shape[1:], mode="nearest-exact")[0]
        edge = F.max_pool2d(truth, 3, 1, 1) != -F.max_pool2d(-truth, 3, 1, 1)
        assert not ((resized != truth) & ~edge).any()


@pytest.mark.parametrize("split", SPLITS)
def test_images_and_tokens(fixture: Path, expected: dict[str, list[dict[str, Any]]], split: str) -> None:
    """What the official mapper gives its model: the same tokens, and pixels within the one grey level by which JPEG
    decoders of different libjpeg versions differ."""
    mapped = load_file(fixture / "mapper_expected.safetensors")
    tokenizer = SentenceTokenizer.load(fixture / "vocab", 20)
    transform = ImageTransform(96, "square", "imagenet")
    for index, record in enumerate(expected[split]):
        ids, mask = tokenizer(record["sentence"]["raw"])
        assert torch.equal(ids, mapped[f"{split}.{index}.lang_tokens"][0])
        assert torch.equal(mask, mapped[f"{split}.{index}.lang_mask"][0].bool())
        picture = Image.open(fixture / "datasets/images/train2014" / record["file_name"]).convert("RGB")
        pixels = mapped[f"{split}.{index}.image"].float()
        mean, std = torch.tensor([123.675, 116.28, 103.53]), torch.tensor([58.395, 57.12, 57.375])
        normalised = (pixels - mean[:, None, None]) / std[:, None, None]
        ours = normalise(transform(picture, None).image, "imagenet")
        torch.testing.assert_close(ours, normalised, rtol=0, atol=1.01 / 57)
