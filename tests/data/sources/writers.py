"""Write one scene in the form of every annotation tool; drawings of our own, facts of the formats."""

import base64
import io
import json
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from amltrain.data.segmentation import encode_mask

Mask = NDArray[np.uint8]


class Object(NamedTuple):
    """mask [h, w] of 0 and 1; polygon: flat, where the mask is that polygon's."""

    label: str
    mask: Mask
    polygon: list[float] | None = None
    sentence: str = ""


def picture(size: tuple[int, int], seed: int = 0) -> Image.Image:
    generator = np.random.default_rng(seed)
    return Image.fromarray(generator.integers(0, 255, (*size, 3), dtype=np.uint8))


def png_text(mask: Mask) -> str:
    written = io.BytesIO()
    Image.fromarray(mask * np.uint8(255)).save(written, "PNG")
    return base64.b64encode(written.getvalue()).decode()


def crop_of(mask: Mask) -> tuple[int, int, Mask]:
    """Left, top and the mask inside its box."""
    rows, columns = np.nonzero(mask)
    left, top = int(columns.min()), int(rows.min())
    return left, top, mask[top : rows.max() + 1, left : columns.max() + 1]


def points(polygon: Sequence[float]) -> list[list[float]]:
    return [list(polygon[i : i + 2]) for i in range(0, len(polygon), 2)]


def write_labelme(root: Path, name: str, size: tuple[int, int], objects: Sequence[Object], **extra: Any) -> Path:
    shapes = []
    for thing in objects:
        shape: dict[str, Any] = {"label": thing.label, "group_id": None, "flags": {}, "description": thing.sentence}
        if thing.polygon is not None:
            shape |= {"points": points(thing.polygon), "shape_type": "polygon"}
        else:
            left, top, crop = crop_of(thing.mask)
            corners = [[left, top], [left + crop.shape[1] - 1, top + crop.shape[0] - 1]]
            shape |= {"points": corners, "shape_type": "mask", "mask": png_text(crop)}
        shapes.append(shape)
    content = {
        "version": "5.5.0",
        "flags": {},
        "shapes": shapes,
        "imagePath": f"..\\pictures\\{name}.jpg",
        "imageData": None,
        "imageHeight": size[0],
        "imageWidth": size[1],
    }
    path = root / f"{name}.json"
    path.write_text(json.dumps({**content, **extra}))
    return path


def write_cvat(root: Path, images: dict[str, tuple[tuple[int, int], Sequence[Object]]]) -> Path:
    lines = ['<?xml version="1.0" encoding="utf-8"?>', "<annotations><version>1.1</version><meta></meta>"]
    for number, (name, (size, objects)) in enumerate(images.items()):
        lines.append(f'<image id="{number}" name="{name}" subset="Train" width="{size[1]}" height="{size[0]}">')
        for thing in objects:
            sentence = f'<attribute name="sentence">{thing.sentence}</attribute>' if thing.sentence else ""
            if thing.polygon is not None:
                pairs = ";".join(f"{x:.2f},{y:.2f}" for x, y in points(thing.polygon))
                lines.append(f'<polygon label="{thing.label}" points="{pairs}" z_order="0">{sentence}</polygon>')
            else:
                left, top, crop = crop_of(thing.mask)
                place = f'left="{left}" top="{top}" width="{crop.shape[1]}" height="{crop.shape[0]}"'
                runs = ", ".join(map(str, runs_of(crop.reshape(-1))))
                lines.append(f'<mask label="{thing.label}" rle="{runs}" {place} z_order="0">{sentence}</mask>')
        lines.append("</image>")
    path = root / "annotations.xml"
    path.write_text("\n".join([*lines, "</annotations>"]))
    return path


def runs_of(flat: NDArray[np.uint8]) -> list[int]:
    """Lengths of runs of 0, 1, 0, ..."""
    changes = np.flatnonzero(np.diff(flat)) + 1
    runs = np.diff(np.concatenate([[0], changes, [flat.size]])).tolist()
    return ([0] if flat[0] else []) + runs


def brush(mask: Mask) -> list[int]:
    """Label Studio's brush of a mask: RGBA bytes, runs where they pay, single values elsewhere."""
    flat = np.repeat(mask.reshape(-1) * np.uint8(255), 4)
    lengths = (3, 4, 8, 16)
    bits: list[int] = []

    def put(value: int, count: int) -> None:
        bits.extend((value >> shift) & 1 for shift in range(count - 1, -1, -1))

    put(flat.size, 32)
    put(8 - 1, 5)
    for length in lengths:
        put(length - 1, 4)
    place = 0
    for run in np.diff(np.concatenate([[0], np.flatnonzero(np.diff(flat.astype(int))) + 1, [flat.size]])).tolist():
        left = run
        while left:
            kind = next((k for k, bit in enumerate(lengths) if left <= 1 << bit), 3)
            count = min(left, 1 << lengths[kind])
            alike = count > 2
            put(int(alike), 1)
            put(kind, 2)
            put(count - 1, lengths[kind])
            for _ in range(1 if alike else count):
                put(int(flat[place]), 8)
            place, left = place + count, left - count
    bits += [0] * (-len(bits) % 8)
    return np.packbits(np.array(bits, np.uint8)).tolist()


def write_label_studio(root: Path, images: dict[str, tuple[tuple[int, int], Sequence[Object]]]) -> Path:
    tasks = []
    for number, (name, (size, objects)) in enumerate(images.items()):
        results: list[dict[str, Any]] = []
        for place, thing in enumerate(objects):
            base = {"id": f"r{place}", "to_name": "image", "original_height": size[0], "original_width": size[1]}
            if thing.polygon is not None:
                percent = [[100 * x / size[1], 100 * y / size[0]] for x, y in points(thing.polygon)]
                value: dict[str, Any] = {"points": percent, "polygonlabels": [thing.label], "closed": True}
                results.append({**base, "type": "polygonlabels", "from_name": "label", "value": value})
            else:
                value = {"format": "rle", "rle": brush(thing.mask), "brushlabels": [thing.label]}
                results.append({**base, "type": "brushlabels", "from_name": "label", "value": value})
            if thing.sentence:
                text = {"text": [thing.sentence]}
                results.append({**base, "type": "textarea", "from_name": "words", "value": text})
        tasks.append(
            {
                "id": number + 1,
                "data": {"image": f"/data/upload/3/0a1b2c3d-{name}"},
                "annotations": [{"id": 7, "was_cancelled": False, "result": results}],
            }
        )
    path = root / "project-1.json"
    path.write_text(json.dumps(tasks))
    return path


def write_yolo(
    root: Path, split: str, name: str, size: tuple[int, int], objects: Sequence[Object], names: list[str]
) -> None:
    labels = root / split / "labels"
    labels.mkdir(parents=True, exist_ok=True)
    lines = []
    for thing in objects:
        assert thing.polygon is not None
        shares = [c / size[1 - i % 2] for i, c in enumerate(thing.polygon)]
        lines.append(" ".join([str(names.index(thing.label)), *map(repr, shares)]))
    (labels / f"{name}.txt").write_text("\n".join(lines) + "\n")
    (root / "data.yaml").write_text(
        f"train: ../train/images\nval: ../valid/images\nnc: {len(names)}\nnames: {json.dumps(names)}\n"
    )


def write_coco(path: Path, images: dict[str, tuple[tuple[int, int], Sequence[Object]]], key: str = "sentence") -> Path:
    content: dict[str, Any] = {"images": [], "annotations": [], "categories": []}
    numbers: dict[str, int] = {}
    for image_id, (name, (size, objects)) in enumerate(images.items()):
        content["images"].append({"id": image_id, "file_name": name, "height": size[0], "width": size[1]})
        for thing in objects:
            category = numbers.setdefault(thing.label, len(numbers))
            mask = [thing.polygon] if thing.polygon is not None else encode_mask(thing.mask)
            entry = {"id": len(content["annotations"]), "image_id": image_id, "category_id": category}
            left, top, crop = crop_of(thing.mask)
            entry |= {"segmentation": mask, "bbox": [left, top, crop.shape[1], crop.shape[0]], "iscrowd": 0}
            content["annotations"].append(entry | ({key: thing.sentence} if thing.sentence else {}))
    content["categories"] = [{"id": number, "name": label} for label, number in numbers.items()]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return path


def write_voc(root: Path, split: str, name: str, objects: Sequence[Object], classes: Sequence[str]) -> None:
    """Palette masks; object k has value k + 1, later objects lie over earlier ones."""
    for folder in ("JPEGImages", "SegmentationObject", "SegmentationClass", "ImageSets/Segmentation"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    shape = objects[0].mask.shape
    things, kinds = np.zeros(shape, np.uint8), np.zeros(shape, np.uint8)
    for number, thing in enumerate(objects, 1):
        things[thing.mask > 0] = number
        kinds[thing.mask > 0] = list(classes).index(thing.label) + 1
    for folder, values in (("SegmentationObject", things), ("SegmentationClass", kinds)):
        image = Image.fromarray(values, "P")
        image.putpalette([value for index in range(256) for value in (index, 255 - index, (7 * index) % 256)])
        image.save(root / folder / f"{name}.png")
    with (root / "ImageSets/Segmentation" / f"{split}.txt").open("a") as lists:
        lists.write(f"{name}\n")


def write_fiftyone(root: Path, images: dict[str, tuple[tuple[int, int], Sequence[Object]]]) -> Path:
    samples = []
    for name, (size, objects) in images.items():
        detections = []
        for thing in objects:
            left, top, crop = crop_of(thing.mask)
            written = io.BytesIO()
            np.save(written, crop.astype(bool), allow_pickle=False)
            packed = base64.b64encode(zlib.compress(written.getvalue())).decode()
            box = [left / size[1], top / size[0], crop.shape[1] / size[1], crop.shape[0] / size[0]]
            label = {"_cls": "Detection", "label": thing.label, "bounding_box": box, "attributes": {}}
            label |= {"mask": {"$binary": {"base64": packed, "subType": "00"}}, "tags": []}
            detections.append(label | ({"sentence": thing.sentence} if thing.sentence else {}))
        metadata = {"_cls": "ImageMetadata", "width": size[1], "height": size[0]}
        field = {"_cls": "Detections", "detections": detections}
        samples.append({"filepath": f"data/{name}", "tags": ["train"], "metadata": metadata, "ground_truth": field})
    path = root / "samples.json"
    path.write_text(json.dumps({"samples": samples}))
    (root / "metadata.json").write_text(json.dumps({"media_type": "image"}))
    return path
