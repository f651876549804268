"""PhraseCut (arXiv 2008.01187): phrases about regions of Visual Genome, several instances each.

    <root>/VGPhraseCut_v0/refer_train.json, refer_val.json, refer_miniv.json, refer_test.json
    <root>/VGPhraseCut_v0/images/<image_id>.jpg

An entry: task_id, image_id, phrase, Polygons (per instance a list of polygons, each a list of [x, y]), instance_boxes.
Layout: ChenyunWu/PhraseCutDataset. The whole val split is refer_val.json and refer_miniv.json (100 images) together.
"""

from pathlib import Path
from typing import Any

from amltrain.data.annotations import Annotations, check_entry
from amltrain.data.json_files import load_json
from amltrain.data.own import TableRow, build_annotations
from amltrain.data.specs import dataset_spec
from amltrain.errors import UserError
from amltrain.files import sha256

_FILES = {"train": ("train",), "val": ("val", "miniv"), "test": ("test",)}


def read_phrasecut(root: Path, name: str) -> Annotations:
    """Read every split that is there. Raises UserError."""
    spec = dataset_spec(name)
    folder = root / spec.folder if (root / spec.folder).is_dir() else root
    paths = {folder / f"refer_{part}.json": split for split in spec.splits for part in _FILES[split]}
    paths = {path: split for path, split in paths.items() if path.is_file()}
    if not paths:
        raise UserError(f"{folder} has no refer_train.json; put PhraseCut's files there")
    rows: list[TableRow] = []
    for path, split in paths.items():
        rows += _rows(path, split, first=len(rows))
    sources = {path.name: sha256(path) for path in paths}
    splits = tuple(dict.fromkeys(paths.values()))
    used = spec._replace(splits=splits, published={split: spec.published[split] for split in splits})
    return build_annotations(rows, name, sources=sources, place=str(folder), spec=used)


def _rows(path: Path, split: str, first: int) -> list[TableRow]:
    """Rows of a file; refs are numbered from `first` on, because phrases have text ids."""
    entries = load_json(path)
    if not isinstance(entries, list):
        raise UserError(f"{path} holds a {type(entries).__name__}, not a list of phrases")
    return [_row(entry, number, path, split, first + number) for number, entry in enumerate(entries)]


def _row(entry: Any, number: int, path: Path, split: str, ref_id: int) -> TableRow:
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
        ref_id,
        image_id,
    )
