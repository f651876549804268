"""Readers of the original files: REFER's `refs(unc|umd|google).p`, gRefCOCO's `grefs(unc).json`, `instances.json`.

Layout and rules: lichengunc/refer (commit e3bbaa3) and henghuiding/gRefCOCO (commit 41a8f00). A ref's own `file_name`
is not a file on disk; the image's is.
"""

import hashlib
import io
import json
import pickle
import reprlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from amltrain.data.segmentation import BrokenSegmentationError, referent_mask
from amltrain.data.specs import DatasetSpec, belongs, dataset_spec
from amltrain.errors import UserError


class ReferFiles(NamedTuple):
    """The parsed files of one data set: refs in file order, the rest by id.

    sources: what was read and its SHA-256, by file name. place: where annotations came from, for messages.
    """

    name: str
    spec: DatasetSpec
    refs: list[dict[str, Any]]
    images: dict[int, dict[str, Any]]
    annotations: dict[int, dict[str, Any]]
    categories: dict[int, str]
    sources: dict[str, str]
    place: str


class Skipped(NamedTuple):
    """A part of the files that could not be used: which, why, and how many sentences went with it."""

    what: str
    why: str
    expressions: int


class ImageGroup(NamedTuple):
    """An image of a split and its usable referents, in the prepared schema but for the image's bytes."""

    image_id: int
    file_name: str
    height: int
    width: int
    referents: list[dict[str, Any]]
    skipped: list[Skipped]


class _ContainerUnpickler(pickle.Unpickler):
    """Admits what annotation files are made of, builtin containers and scalars, and refuses everything else."""

    _ADMITTED = frozenset({"set", "frozenset", "list", "dict", "tuple", "int", "float", "str", "bool"})

    def find_class(self, module: str, name: str) -> Any:
        if module in ("builtins", "__builtin__") and name in self._ADMITTED:
            return super().find_class("builtins", name)
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


def load_pickle(path: Path) -> Any:
    """Read a pickle of builtin containers (also Python 2's). Executes nothing; raises UserError for anything else."""
    content = _read_bytes(path)
    try:
        return _ContainerUnpickler(io.BytesIO(content), encoding="utf-8", errors="replace").load()
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{path} is no plain annotation pickle ({error}); download it again from a source you trust"
        ) from error
    except Exception as error:  # a damaged pickle can raise almost anything
        raise UserError(f"{path} is damaged ({type(error).__name__}: {error}); download it again") from error


def load_json(path: Path) -> Any:
    """Read a JSON file. Raises UserError."""
    try:
        return json.loads(_read_bytes(path).decode())
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{path} is damaged or no JSON ({error}); download it again") from error


def refer_paths(root: Path, dataset: str) -> tuple[Path, Path]:
    """Where the refs and the instances of `dataset` lie under a REFER root. Raises UserError if one is missing."""
    spec = dataset_spec(dataset)
    folder = root / spec.folder
    candidates = [folder / f"{spec.refs_name}{ending}" for ending in (".p", ".json")]
    refs_path = next((path for path in candidates if path.is_file()), None)
    instances_path = folder / "instances.json"
    if refs_path is None or not instances_path.is_file():
        wanted = candidates[spec.generalised] if refs_path is None else instances_path
        raise UserError(
            f"{folder} has no {wanted.name}; put {dataset}'s original files there (docs/data.md says where to get them)"
        )
    return refs_path, instances_path


def read_refer(root: Path, dataset: str) -> ReferFiles:
    """Read the files of `dataset` under a REFER root. Raises UserError naming the file and what it lacks."""
    spec = dataset_spec(dataset)
    refs_path, instances_path = refer_paths(root, dataset)
    refs = load_pickle(refs_path) if refs_path.suffix == ".p" else load_json(refs_path)
    instances = load_json(instances_path)
    for key in ("images", "annotations", "categories"):
        if not isinstance(instances, dict) or not isinstance(instances.get(key), list):
            raise UserError(f"{instances_path} has no list {key!r}; it should be {dataset}'s instances.json")
    if not isinstance(refs, list):
        raise UserError(f"{refs_path} holds a {type(refs).__name__}, not a list of refs")
    check_refs(refs, str(refs_path))
    place = str(instances_path)
    return ReferFiles(
        dataset,
        spec,
        refs,
        by_id(instances["images"], "image", ("file_name", "height", "width"), place),
        by_id(instances["annotations"], "annotation", ("segmentation", "bbox", "category_id"), place),
        {key: entry["name"] for key, entry in by_id(instances["categories"], "category", ("name",), place).items()},
        {path.name: sha256(path) for path in (refs_path, instances_path)},
        place,
    )


def by_id(entries: Sequence[Any], kind: str, keys: Sequence[str], place: str) -> dict[int, dict[str, Any]]:
    """Entries by their `id`. Raises UserError for one that lacks a key, or whose value cannot be used."""
    for number, entry in enumerate(entries):
        _check_entry(entry, ("id", *keys), f"{kind} number {number}", place)
    return {entry["id"]: entry for entry in entries}


def check_refs(refs: Sequence[Any], place: str) -> None:
    """Raise UserError for a ref or a sentence that lacks a key or whose value cannot be used, and for no sentence."""
    for number, ref in enumerate(refs):
        _check_entry(ref, ("ref_id", "image_id", "ann_id", "split", "sentences"), f"ref number {number}", place)
        for sentence in ref["sentences"]:
            _check_entry(sentence, ("sent_id",), f"a sentence of ref {ref['ref_id']}", place)
    if not any(ref["sentences"] for ref in refs):
        raise UserError(f"{place} holds no sentence at all; download the file again")


def _check_entry(entry: Any, keys: Sequence[str], what: str, place: str) -> None:
    """Raise UserError unless the entry has the keys, with values that can be used."""
    for key in keys:
        if not isinstance(entry, dict) or key not in entry:
            raise UserError(f"{place}: {what} has no {key!r}; download the file again")
        fits, wanted = _VALUES.get(key, (lambda value: True, ""))
        if not fits(entry[key]):
            raise UserError(f"{place}: {what} has {key!r} {reprlib.repr(entry[key])}, not {wanted}; mend the file")


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_side(value: Any) -> bool:
    return _is_id(value) and value > 0


def _is_ann_id(value: Any) -> bool:
    return _is_id(value) or (isinstance(value, list) and all(map(_is_id, value)))


def _is_box(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and len(value) == 4 and all(isinstance(v, (int, float)) for v in value)


_VALUES: dict[str, tuple[Callable[[Any], bool], str]] = {
    **dict.fromkeys(("id", "ref_id", "sent_id", "image_id", "category_id"), (_is_id, "a whole number")),
    **dict.fromkeys(("height", "width"), (_is_side, "a whole number above 0")),
    **dict.fromkeys(("split", "file_name", "name"), (lambda value: isinstance(value, str), "a text")),
    "ann_id": (_is_ann_id, "a whole number or a list of them"),
    "bbox": (_is_box, "four numbers"),
    "sentences": (lambda value: isinstance(value, list), "a list"),
}
"""What the values of an entry have to be, and how to say it. A segmentation is judged where it is read."""


def sha256(path: Path) -> str:
    """Of a file's content, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for block in iter(lambda: file.read(2**20), b""):
            digest.update(block)
    return digest.hexdigest()


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"could not read {path} ({error.strerror})") from error


def image_groups(files: ReferFiles, split: str) -> Iterator[ImageGroup]:
    """The split's images in the order in which the refs first name them, each with its referents."""
    by_image: dict[int, list[dict[str, Any]]] = {}
    for ref in files.refs:
        if belongs(ref["split"], split):
            by_image.setdefault(ref["image_id"], []).append(ref)
    for image_id, refs in by_image.items():
        image = files.images.get(image_id)
        if image is None:
            expressions = sum(len(ref["sentences"]) for ref in refs)
            skipped = [Skipped(f"image {image_id}", f"{files.place} does not list it", expressions)]
            yield ImageGroup(image_id, "", 0, 0, [], skipped)
            continue
        referents, skipped = [], []
        for ref in refs:
            referent, reasons = _referent(ref, image, files)
            referents += [referent] if referent else []
            skipped += reasons
        yield ImageGroup(image_id, image["file_name"], image["height"], image["width"], referents, skipped)


def _referent(
    ref: dict[str, Any], image: dict[str, Any], files: ReferFiles
) -> tuple[dict[str, Any] | None, list[Skipped]]:
    name, skipped = f"ref {ref['ref_id']} of image {image['id']}", []
    sentences = []
    for sentence in ref["sentences"]:
        sent = str(sentence.get("sent") or "").strip()
        raw = str(sentence.get("raw") or sent).strip()
        if sent or raw:
            sentences.append({"sent_id": sentence["sent_id"], "sent": sent or raw.lower(), "raw": raw or sent})
        else:
            skipped.append(Skipped(f"sentence {sentence.get('sent_id')} of {name}", "it is empty", 1))
    if not sentences:
        return None, [*skipped, Skipped(name, "it has no sentence", 0)]
    ann_ids = ref["ann_id"] if isinstance(ref["ann_id"], list) else [ref["ann_id"]]
    no_target = ann_ids == [-1]
    try:
        annotations = [] if no_target else _annotations(ann_ids, files)
        masks = referent_mask([a["segmentation"] for a in annotations], image["height"], image["width"])
    except BrokenSegmentationError as error:
        return None, [*skipped, Skipped(name, f"broken segmentation: {error}", len(sentences))]
    skipped += [Skipped(f"a polygon of {name}", why, 0) for why in masks.dropped]
    referent = {
        "ref_id": ref["ref_id"],
        "ann_ids": [] if no_target else ann_ids,
        "category": ", ".join(dict.fromkeys(files.categories.get(a["category_id"], "?") for a in annotations)),
        "bbox": _joint_box([a["bbox"] for a in annotations]),
        "no_target": no_target,
        "mask": masks.union,
        "mask_exclusive": masks.exclusive,
        "sentences": sentences,
    }
    return referent, skipped


def _annotations(ann_ids: list[int], files: ReferFiles) -> list[dict[str, Any]]:
    """The named annotations; among several, crowds are left out (gRefCOCO's rule)."""
    missing = [ann_id for ann_id in ann_ids if ann_id not in files.annotations]
    if missing:
        raise BrokenSegmentationError(f"{files.place} has no annotation {missing[0]}")
    annotations = [files.annotations[ann_id] for ann_id in ann_ids]
    kept = [a for a in annotations if len(annotations) == 1 or not a.get("iscrowd", 0)]
    if not kept:
        raise BrokenSegmentationError("all its annotations are crowds")
    return kept


def _joint_box(boxes: list[list[float]]) -> list[float]:
    if not boxes:
        return []
    left, top = min(x for x, _, _, _ in boxes), min(y for _, y, _, _ in boxes)
    right, bottom = max(x + w for x, _, w, _ in boxes), max(y + h for _, y, _, h in boxes)
    return [left, top, right - left, bottom - top]
