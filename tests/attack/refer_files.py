"""Annotations: every value of refs and instances, and masks."""

import json
import pickle
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from amltrain.data.prepare import prepare
from amltrain.data.segmentation import decode_mask, referent_mask
from amltrain.errors import UserError
from tests.attack.cases import DAMAGED, Case, Place, odd
from tests.data.original import HEIGHT, WIDTH

REF = (
    ("ref_id",), ("image_id",), ("ann_id",), ("split",), ("sentences",), ("category_id",),
    ("sentences", 0), ("sentences", 0, "sent_id"), ("sentences", 0, "sent"), ("sentences", 0, "raw"),
)  # fmt: skip
INSTANCES = (
    ("images",), ("annotations",), ("categories",), ("images", 0), ("images", 0, "id"), ("images", 0, "file_name"),
    ("images", 0, "height"), ("images", 0, "width"), ("annotations", 0), ("annotations", 0, "id"),
    ("annotations", 0, "image_id"), ("annotations", 0, "category_id"), ("annotations", 0, "bbox"),
    ("annotations", 0, "segmentation"), ("annotations", 0, "iscrowd"), ("categories", 0), ("categories", 0, "name"),
)  # fmt: skip
VALUES = ("null", "true", "-1", "2^70", "1e999", "NUL", "half a surrogate", "100,000 letters", "[]", "nested")
LONE = {"size": [HEIGHT, WIDTH]}
MASKS: dict[str, Any] = {
    "10^9 pixels a side": {"size": [10**9, 10**9], "counts": [10**18]},
    "another size": {"size": [WIDTH, HEIGHT], "counts": [WIDTH * HEIGHT]},
    "a long size": {"size": list(range(10**5)), "counts": [1]},
    "no size": {"counts": [HEIGHT * WIDTH]},
    "a size of texts": {"size": ["a", "b"], "counts": "0"},
    "a number that never ends": LONE | {"counts": "o" * 10**6},
    "100,000 zeros": LONE | {"counts": "0" * 10**5},
    "letters": LONE | {"counts": "garbage!"},
    "no ASCII": LONE | {"counts": "\u20ac\ud800"},
    "NUL": LONE | {"counts": "\0"},
    "half a number": LONE | {"counts": "P"},
    "a run too long": LONE | {"counts": [HEIGHT * WIDTH + 1]},
    "runs too short": LONE | {"counts": [5]},
    "a negative run": LONE | {"counts": [-5, HEIGHT * WIDTH + 5]},
    "runs of 70 bits": LONE | {"counts": [2**70, -(2**70) + HEIGHT * WIDTH]},
    "a million runs of nothing": LONE | {"counts": [0] * 10**6 + [HEIGHT * WIDTH]},
    "runs of fractions": LONE | {"counts": [0.5, HEIGHT * WIDTH - 0.5]},
    "runs of texts": LONE | {"counts": ["5", "5"]},
    "an object of runs": LONE | {"counts": {"a": 1}},
    "runs of truth": LONE | {"counts": [True, HEIGHT * WIDTH - 1]},
    "no counts": LONE,
    "nothing": None,
    "a text": "x",
}
POLYGONS: dict[str, Any] = {
    "two points": [[0, 0, 9, 9]],
    "an odd number": [[0, 0, 9, 0, 9, 9, 1]],
    "NaN": [[0, 0, 9, 0, float("nan"), 9]],
    "infinite": [[0, 0, 9, 0, float("inf"), 9]],
    "10^300": [[0, 0, 1e300, 0, 9, 9]],
    "2^70": [[0, 0, 2**70, 0, 9, 9]],
    "texts": [["0", "0", "9", "0", "9", "9"]],
    "far outside": [[10**6, 10**6, 10**6 + 9, 10**6, 10**6 + 9, 10**6 + 9]],
    "20,000 polygons": [[0, 0, 9, 0, 9, 9]] * 20_000,
    "outside by a little": [[-30, -20, -10, -20, -10, -5]],
    "no area": [[5, 5, 5, 5, 5, 5]],
    "nested": [[[0, 0], [9, 0], [9, 9]]],
    "null": [None],
    "mixed": [[0, 0, 9, 0, 9, 9], {"size": [HEIGHT, WIDTH], "counts": [1]}],
    "a number": 5,
    "empty": [],
}
LONG = [float(number) for i in range(20_000) for number in (i % 2 * 8999, i % 9000)]


def set_in(content: Any, keys: Sequence[Any], value: Any) -> None:
    for key in keys[:-1]:
        content = content[key]
    content[keys[-1]] = value


def _refs(keys: Sequence[Any], value: Any) -> Callable[[Place], Any]:
    def attack(place: Place) -> Any:
        root = place.copy(place.root)
        path = root / "refcoco" / "refs(unc).p"
        refs = pickle.loads(path.read_bytes())
        set_in(refs[0], keys, value)
        path.write_bytes(pickle.dumps(refs))
        return prepare("refcoco", root, place.folder / "out", progress=False)

    return attack


def _instances(keys: Sequence[Any], value: Any) -> Callable[[Place], Any]:
    def attack(place: Place) -> Any:
        root = place.copy(place.root)
        path = root / "refcoco" / "instances.json"
        content = json.loads(path.read_text())
        set_in(content, keys, value)
        path.write_text(json.dumps(content))
        return prepare("refcoco", root, place.folder / "out", progress=False)

    return attack


def _file(name: str, content: bytes) -> Callable[[Place], Any]:
    def attack(place: Place) -> Any:
        root = place.copy(place.root)
        (root / "refcoco" / name).write_bytes(content)
        return prepare("refcoco", root, place.folder / "out", progress=False)

    return attack


def _secret(place: Place) -> Any:
    """A picture beside the images must not get into the prepared data."""
    place.secret.with_suffix(".jpg").write_bytes(next(place.root.rglob("*.jpg")).read_bytes())
    return _instances(("images", 0, "file_name"), f"../../../../../{place.secret.name}.jpg")(place)


def _components(segmentation: Any, size: tuple[int, int] = (HEIGHT, WIDTH)) -> Callable[[Place], Any]:
    def attack(_: Place) -> Any:
        try:
            return referent_mask([segmentation], *size)
        except ValueError as error:  # BrokenSegmentationError, which prepare counts
            raise UserError(str(error)) from error

    return attack


def cases() -> Iterator[Case]:
    kind = "annotations"
    for keys in REF:
        for name, value in odd(VALUES):
            yield Case(kind, f"refs {'.'.join(map(str, keys))}: {name}", "decided", _refs(keys, value))
    for keys in INSTANCES:
        for name, value in odd(VALUES):
            yield Case(kind, f"instances {'.'.join(map(str, keys))}: {name}", "decided", _instances(keys, value))
    for file in ("refs(unc).p", "instances.json"):
        for name, content in DAMAGED.items():
            yield Case(kind, f"{file}: {name}", "rejected", _file(file, content))
    yield Case("paths", "file_name of a picture outside", "rejected", _secret)
    for name, mask in MASKS.items():
        truth = name == "runs of truth"
        alone = "decided" if truth or name == "another size" else "rejected"  # of which image, it cannot know
        yield Case("masks", f"prepared: {name}", alone, lambda _, m=mask: decode_mask(m))
        yield Case("masks", f"annotation: {name}", "decided" if truth else "rejected", _components(mask))
        yield Case("masks", f"annotation list: {name}", "decided" if truth else "rejected", _components([mask]))
    for name, polygons in POLYGONS.items():
        expected = "used" if name == "mixed" else "rejected"  # what is no polygon is dropped
        yield Case("masks", f"polygons: {name}", expected, _components(polygons))
    square = [[0, 0, 9, 0, 9, 9]]
    for size in ((10**9, 10**9), (0, 5), (-5, 5), (2**31, 1), (2**16, 2**16)):
        yield Case("masks", f"polygons in {size[0]} x {size[1]}", "rejected", _components(square, size))
    yield Case("masks", "an endless outline", "rejected", _components([LONG], (9000, 9000)))
