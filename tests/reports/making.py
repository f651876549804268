"""Make the files of an input: pictures with a red block, tables, masks."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, ImageDraw

BOX = (8, 8, 24, 24)
POLYGON = [8, 8, 24, 8, 24, 24, 8, 24]
SIZE = (48, 64)
AREA = 256


class Input(NamedTuple):
    """write: makes the files in a folder and returns the arguments. right: the rows, or a part of the message."""

    kind: str
    name: str
    write: Callable[[Path], list[str]]
    right: Any


def scene(size: tuple[int, int] = SIZE, box: tuple[int, int, int, int] = BOX, seed: int = 0) -> Image.Image:
    """A grey noisy picture with a red block."""
    noise = np.random.default_rng(seed).integers(90, 130, (*size, 3), dtype=np.uint8)
    image = Image.fromarray(noise)
    ImageDraw.Draw(image).rectangle((box[0], box[1], box[2] - 1, box[3] - 1), fill=(220, 30, 30))
    return image


def pictures(folder: Path, names: tuple[str, ...] = ("a.jpg", "b.jpg")) -> None:
    for seed, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        scene(seed=seed).save(folder / name, "JPEG", quality=95)


def mask(size: tuple[int, int] = SIZE, box: tuple[int, int, int, int] = BOX) -> np.ndarray:
    made = np.zeros(size, np.uint8)
    made[box[1] : box[3], box[0] : box[2]] = 1
    return made


def runs(made: np.ndarray) -> list[int]:
    flat = made.T.reshape(-1)
    changes = np.flatnonzero(np.diff(flat)) + 1
    found = np.diff(np.concatenate([[0], changes, [flat.size]])).tolist()
    return ([0] if flat[0] else []) + found


def compressed(made: np.ndarray) -> dict[str, Any]:
    from pycocotools import mask as coco

    found = coco.encode(np.asfortranarray(made))
    return {"size": list(made.shape), "counts": found["counts"].decode()}


def table(name: str, content: str | bytes, *more: str) -> Callable[[Path], list[str]]:
    def write(folder: Path) -> list[str]:
        pictures(folder)
        data = content.encode() if isinstance(content, str) else content
        (folder / name).write_bytes(data)
        return ["--table", str(folder / name), *more]

    return write


def rows(*entries: dict[str, Any]) -> str:
    base = {"image": "a.jpg", "sentence": "the block", "mask": [POLYGON], "split": "train"}
    return "\n".join(json.dumps({**base, **entry}) for entry in entries)


def jsonl(*entries: dict[str, Any]) -> Callable[[Path], list[str]]:
    return table("t.jsonl", rows(*entries))


def parquet(columns: dict[str, Any]) -> Callable[[Path], list[str]]:
    def write(folder: Path) -> list[str]:
        pictures(folder)
        pq.write_table(pa.table(columns), folder / "t.parquet")
        return ["--table", str(folder / "t.parquet")]

    return write


P = f'"[{POLYGON}]"'
T = f"[{POLYGON}]"
ONE = [("the block", AREA, "train")]


def one_line(sentence: str) -> str:
    """A row of JSON Lines whose characters are not escaped."""
    return json.dumps({"image": "a.jpg", "sentence": sentence, "mask": [POLYGON], "split": "train"}, ensure_ascii=False)


def csv_one(sentence: str, header: str = "image,sentence,mask,split") -> str:
    return f"{header}\na.jpg,{sentence},{P},train\n"
