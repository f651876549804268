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


def corner(size: int) -> np.ndarray:
    """A square of `size` pixels at the top left."""
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    mask[:size, :size] = 1
    return mask


def encoded(mask: np.ndarray) -> dict[str, Any]:
    rle = coco.encode(np.asfortranarray(mask))
    return {"size": [HEIGHT, WIDTH], "counts": rle["counts"].decode()}


def hub_image(number: int) -> dict[str, Any]:
    content = io.BytesIO()
    Image.new("RGB", (WIDTH, HEIGHT), (number, 8, 16)).save(content, "JPEG")
    return {"bytes": content.getvalue(), "path": f"{number}.jpg"}


def write_shard(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    masks = pa.list_(pa.struct({"size": pa.list_(pa.int64()), "counts": pa.string()}))
    table = pa.Table.from_pylist(rows)
    if "masks" in table.column_names:
        table = table.set_column(table.column_names.index("masks"), "masks", table.column("masks").cast(masks))
    pq.write_table(table, path)


def gseval(root: Path) -> None:
    """Two lines about one picture, as the JSON lines of the authors' repository."""
    folder = root / "GSEval"
    picture(folder / "unlabeled2017/000000000267.jpg", 1)
    lines = [
        {
            "idx": number, "image_path": "unlabeled2017/000000000267.jpg", "class_id": number + 1, "label": "smoke",
            "caption": f"Trail {number} behind the plane.", "box": [5.2, 5.1, 24.9, 25.0],
            "segmentation": run_lengths(),
        }
        for number in range(2)
    ]  # fmt: skip
    (folder / "GroundingSuite-Eval.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def pbench(root: Path) -> None:
    """In every split one expression of two instances and one of none, about the same picture."""
    for number, split in enumerate(("level_0", "level_1", "level_2", "level_3", "level_4", "dense")):
        other = np.zeros((HEIGHT, WIDTH), np.uint8)
        other[20:30, 20:30] = 1  # 25 pixels of it are in the square
        rows = [
            {
                "image": hub_image(number), "expression": "Both squares", "count": 2, "id": 2 * number,
                "masks": [run_lengths(), encoded(other)],
            },
            {"image": hub_image(number), "expression": "a dog", "masks": [], "count": 0, "id": 2 * number + 1},
        ]  # fmt: skip
        write_shard(root / f"PBench/data/{split}-00000-of-00001.parquet", rows)


def ref_adv(root: Path) -> None:
    rows = [
        {
            "image": hub_image(number), "file_name": f"{number}.jpg", "normal_caption": "the man who does not sit",
            "solution": [5.0, 5.0, 25.0, 25.0], "width": WIDTH, "height": HEIGHT, "image_source": "coco",
            "human_authored": True, "use_negation": True, "distractors": distractors,
        }
        for number, distractors in enumerate(("[1, 2]", "[1, 2, 3, 4]", "[1, 2, 3, 4, 5, 6, 7]", "[1, 2, 3]"))
    ]  # fmt: skip
    write_shard(root / "ref-adv-s/data/train-00000-of-00001.parquet", rows)


def nwpu_refer(root: Path) -> None:
    """In every split: one target, two targets as two refs, and none; the first has a Chinese sentence, too."""
    folder = root / "NWPU-Refer"
    refs, annotations, images = [], [], []
    for number, split in enumerate(("train", "val", "test")):
        picture(folder / f"image/image/{number}.jpg", number)
        images.append({"id": number, "file_name": f"{number}.jpg", "height": HEIGHT, "width": WIDTH})
        for part, left in enumerate((5.0, 30.0)):
            corners = [left, 5.0, left + 10, 5.0, left + 10, 15.0, left, 15.0]
            annotations.append({
                "id": 10 * number + part, "image_id": number, "category_id": 1, "segmentation": [corners],
                "bbox": [left, 5.0, 10.0, 10.0],
            })  # fmt: skip
        found = (
            (10 * number, ["the left ship", "左边的船"]),
            (10 * number, ["all ships"]), (10 * number + 1, ["all ships"]), (-1, ["the airplane"]),
        )  # fmt: skip
        for ann_id, texts in found:
            sentences = [{"sent_id": 10 * len(refs) + i, "sent": t, "raw": t} for i, t in enumerate(texts)]
            refs.append({
                "ref_id": len(refs), "image_id": number, "ann_id": ann_id, "split": split, "category_id": 1,
                "sentences": sentences,
            })  # fmt: skip
    content = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "ship"}]}
    (folder / "new_instances.json").write_text(json.dumps(content))
    (folder / "new_refs(unc).p").write_bytes(pickle.dumps(refs))


BENCHMARKS: dict[str, Callable[[Path], None]] = {
    "gseval": gseval,
    "pbench": pbench,
    "ref-adv-s": ref_adv,
    "nwpu-refer": nwpu_refer,
    "refcoco-m": refcoco_m,
}

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
