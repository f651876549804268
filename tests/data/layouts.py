"""Small published data sets, written in the layout in which they are found."""

import io
import json
import pickle
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from pycocotools import mask as coco

from tests.data.original import HEIGHT, WIDTH, Original

SQUARE = [[5.0, 5.0], [25.0, 5.0], [25.0, 25.0], [5.0, 25.0]]


def square() -> np.ndarray:
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    mask[5:25, 5:25] = 1
    return mask


def run_lengths() -> dict[str, Any]:
    rle = coco.encode(np.asfortranarray(square()))
    return {"size": [HEIGHT, WIDTH], "counts": rle["counts"].decode()}


def picture(path: Path, number: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (WIDTH, HEIGHT), (number % 256, 80, 160)).save(path)


def rrsis_d(root: Path) -> None:
    """Segmentations are lists of one RLE; images lie in images/rrsisd/JPEGImages."""
    original = Original(root, "rrsis-d")
    for image, annotation in zip(original.images, original.annotations, strict=True):
        image["file_name"] = f"{image['id']:05d}.jpg"
        annotation["segmentation"] = [run_lengths()]
    move_images(original, root / "images/rrsisd/JPEGImages")


def refclef(root: Path, name: str = "refclef") -> None:
    original = Original(root, name)
    for annotation in original.annotations:
        annotation["segmentation"] = [run_lengths()]
    move_images(original, root / "images/saiapr_tc-12")


def move_images(original: Original, folder: Path) -> None:
    original.write()
    for number, image in enumerate(original.images):
        original.image_file(number).unlink()
        picture(folder / image["file_name"], image["id"])


def ref_zom(root: Path) -> None:
    """`source` "zero" means that the sentences refer to nothing; several annotations are one target."""
    original = Original(root, "ref-zom", per_split=3)
    for number, ref in enumerate(original.refs):
        ref["source"] = ("one", "many", "zero")[number % 3]
        ref["ann_id"] = [] if ref["source"] == "zero" else [ref["ann_id"]]
    move_images(original, root / "trainval2014")


def r_refcoco(root: Path, name: str = "r-refcoco") -> None:
    """Sentences carry `exist`; a ref has some about its object and some about nothing."""
    original = Original(root, name)
    for ref in original.refs:
        ref["sentences"][0]["exist"] = True
        ref["sentences"][1]["exist"] = False
    original.write()


def phrasecut(root: Path) -> None:
    folder = root / "VGPhraseCut_v0"
    for number, split in enumerate(("train", "val", "test", "miniv"), 1):
        tasks = [
            {
                "task_id": f"{number}__{i}", "image_id": 10 * number, "phrase": phrase, "ann_ids": [1],
                "Polygons": [[SQUARE], [[[30, 2], [38, 2], [38, 8], [30, 8]]]],
                "instance_boxes": [[5, 5, 20, 20], [30, 2, 8, 6]],
            }
            for i, phrase in enumerate(("white squares", "all the things"))
        ]  # fmt: skip
        picture(folder / "images" / f"{10 * number}.jpg", number)
        (folder / f"refer_{split}.json").write_text(json.dumps(tasks))


def refcoco_m(root: Path) -> None:
    rows = []
    for number in range(3):
        content = io.BytesIO()
        Image.new("RGB", (WIDTH, HEIGHT), (number, 8, 16)).save(content, "JPEG")
        sample = {
            "id": number, "image_id": number, "category": "person", "supercategory": "person", "label": "",
            "sentences": ["the man", "left man"], "bbox": [5.0, 5.0, 20.0, 20.0], "mask": run_lengths(),
        }  # fmt: skip
        name = f"COCO_train2014_{number:012d}.jpg"
        image = {"bytes": content.getvalue(), "path": name}
        rows.append({"image": image, "image_id": number, "file_name": name, "samples": [sample]})
    (root / "refcoco-m/data").mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(rows), root / "refcoco-m/data/validation-00000-of-00001.parquet")


def reasonseg(root: Path) -> None:
    """labelme files; an `ignore` region inside the target, and one file in cp1252."""
    for number, split in enumerate(("train", "val", "test")):
        content = {
            "text": ["What would he drink from? Café"], "is_sentence": True,
            "shapes": [
                {"label": "ignore", "points": [[10, 10], [14, 10], [14, 14], [10, 14]]},
                {"label": "target", "points": SQUARE},
                {"label": "flag", "points": [[0, 0], [1, 1]]},
            ],
        }  # fmt: skip
        picture(root / "ReasonSeg" / split / f"{number}.jpg", number)
        text = json.dumps(content, ensure_ascii=False)
        (root / "ReasonSeg" / split / f"{number}.json").write_bytes(text.encode("cp1252" if number else "utf-8"))


def refsegrs(root: Path) -> None:
    folder = root / "RefSegRS"
    (folder / "masks").mkdir(parents=True)
    for number, split in enumerate(("train", "val", "test"), 1):
        picture(folder / "images" / f"{number}.tif", number)
        Image.fromarray(square() * np.uint8(255)).save(folder / "masks" / f"{number}.tif")
        (folder / f"output_phrase_{split}.txt").write_text(f"{number} road along the field\n")


LAYOUTS: dict[str, Callable[[Path], None]] = {
    "rrsis-d": rrsis_d,
    "refclef": refclef,
    "refclef-unc": partial(refclef, name="refclef-unc"),
    "ref-zom": ref_zom,
    "r-refcoco": r_refcoco,
    "r-refcoco+": partial(r_refcoco, name="r-refcoco+"),
    "r-refcocog": partial(r_refcoco, name="r-refcocog"),
    "phrasecut": phrasecut,
    "refcoco-m": refcoco_m,
    "reasonseg": reasonseg,
    "refsegrs": refsegrs,
}


def rewrite_refs(path: Path, change: Callable[[list[dict[str, Any]]], None]) -> None:
    refs = pickle.loads(path.read_bytes())
    change(refs)
    path.write_bytes(pickle.dumps(refs))
