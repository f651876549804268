"""PhraseCut (arXiv 2008.01187): phrases about regions of Visual Genome, several instances each.

    <root>/VGPhraseCut_v0/refer_train.json, refer_val.json, refer_test.json
    <root>/VGPhraseCut_v0/images/<image_id>.jpg

An entry: task_id, image_id, phrase, Polygons (per instance a list of polygons, each a list of [x, y]), instance_boxes.
Layout: ChenyunWu/PhraseCutDataset.
"""

from pathlib import Path
from typing import Any

from amltrain.data.annotations import Annotations, check_entry
from amltrain.data.json_files import load_json
from amltrain.data.own import TableRow, build_annotations
from amltrain.data.specs import dataset_spec
from amltrain.errors import UserError
from amltrain.files import sha256


def read_phrasecut(root: Path, name: str) -> Annotations:
    """Read every split that is there; `miniv` and test lists of the original are not used. Raises UserError."""
    spec = dataset_spec(name)
    folder = root / spec.folder if (root / spec.folder).is_dir() else root
    paths = {split: folder / f"refer_{split}.json" for split in spec.splits}
    paths = {split: path for split, path in paths.items() if path.is_file()}
    if not paths:
        raise UserError(f"{folder} has no refer_train.json; put PhraseCut's files there")
    rows = [row for split, path in paths.items() for row in _rows(path, split)]
    sources = {path.name: sha256(path) for path in paths.values()}
    used = spec._replace(splits=tuple(paths), published={s: spec.published[s] for s in paths})
    return build_annotations(rows, name, sources=sources, place=str(folder), spec=used)


def _rows(path: Path, split: str) -> list[TableRow]:
    entries = load_json(path)
    if not isinstance(entries, list):
        raise UserError(f"{path} holds a {type(entries).__name__}, not a list of phrases")
    return [_row(entry, number, path, split) for number, entry in enumerate(entries)]


def _row(entry: Any, number: int, path: Path, split: str) -> TableRow:
    place = f"entry {number} of {path.name}"
    check_entry(entry, ("image_id", "phrase", "Polygons"), f"entry {number}", str(path))
    if not isinstance(entry["phrase"], str):
        raise UserError(f"{path}: entry {number} has a phrase that is not text")
    polygons = []
    for instance in entry["Polygons"] if isinstance(entry["Polygons"], list) else ():
        for polygon in instance if isinstance(instance, list) else ():
            fits = isinstance(polygon, list) and all(isinstance(p, list) and len(p) == 2 for p in polygon)
            polygons.append([c for point in polygon for c in point] if fits else polygon)
    image_id = entry["image_id"]
    return TableRow(
        place,
        f"{image_id}.jpg",
        (" ".join(entry["phrase"].split()),),
        polygons,
        split,
        number + _OFFSETS[split],
        image_id,
    )


_OFFSETS = {"train": 0, "val": 1_000_000, "test": 2_000_000}
"""Phrases have text ids; refs are numbered in file order, so that they differ between splits."""
