"""A few images with annotations in the original REFER layout, which tests spoil before they prepare them."""

import json
import pickle
from pathlib import Path
from typing import Any

from PIL import Image

from amltrain.data.catalog import dataset_spec

WIDTH, HEIGHT = 40, 30
IMAGES = "images/mscoco/images/train2014"
SQUARE = [5.0, 5.0, 25.0, 5.0, 25.0, 25.0, 5.0, 25.0]


class Original:
    """`images`, `annotations` and `refs` are plain lists to change; `write` puts them on the disk."""

    def __init__(self, root: Path, dataset: str = "refcoco", per_split: int = 3, first_image: int = 1) -> None:
        self.root, self.dataset, self.spec = root, dataset, dataset_spec(dataset)
        self.images: list[dict[str, Any]] = []
        self.annotations: list[dict[str, Any]] = []
        self.refs: list[dict[str, Any]] = []
        for split in self.spec.splits:
            for _ in range(per_split):
                self.add(first_image + len(self.images), split)

    def add(self, image_id: int, split: str, sentences: tuple[str, ...] = ("the square", "left thing")) -> None:
        """One image with one square and one ref of two sentences; every id is a function of the image's."""
        name = f"COCO_train2014_{image_id:012d}.jpg"
        self.images.append({"id": image_id, "file_name": name, "height": HEIGHT, "width": WIDTH})
        self.annotations.append({
            "id": 100 + image_id, "image_id": image_id, "category_id": 1, "bbox": [5.0, 5.0, 20.0, 20.0],
            "segmentation": [list(SQUARE)], "iscrowd": 0, "area": 400,
        })  # fmt: skip
        self.refs.append({
            "ref_id": 1000 + image_id, "image_id": image_id, "split": split, "category_id": 1,
            "ann_id": [100 + image_id] if self.spec.generalised else 100 + image_id,
            "file_name": name.replace(".jpg", f"_{image_id}.jpg"),
            "sentences": [
                {"sent_id": 10 * image_id + i, "sent": sent, "raw": sent.capitalize(), "tokens": sent.split()}
                for i, sent in enumerate(sentences)
            ],
        })  # fmt: skip

    @property
    def folder(self) -> Path:
        return self.root / self.spec.folder

    @property
    def refs_file(self) -> Path:
        return self.folder / f"{self.spec.refs_name}{'.json' if self.spec.generalised else '.p'}"

    def image_file(self, number: int) -> Path:
        return self.root / IMAGES / self.images[number]["file_name"]

    def write(self) -> "Original":
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.root / IMAGES).mkdir(parents=True, exist_ok=True)
        for number, image in enumerate(self.images):
            size = (image["width"], image["height"])
            Image.new("RGB", size, (image["id"] % 256, 80, 160)).save(self.image_file(number))
        categories = [{"id": 1, "name": "person"}, {"id": 2, "name": "bicycle"}]
        instances = {"images": self.images, "annotations": self.annotations, "categories": categories}
        (self.folder / "instances.json").write_text(json.dumps(instances))
        if self.spec.generalised:
            self.refs_file.write_text(json.dumps(self.refs))
        else:
            self.refs_file.write_bytes(pickle.dumps(self.refs, protocol=2))
        return self
