"""RefSegRS (arXiv 2306.08625): sentences about aerial images.

    <root>/RefSegRS/output_phrase_train.txt, output_phrase_val.txt, output_phrase_test.txt: lines of "NUMBER SENTENCE"
    <root>/RefSegRS/images/NUMBER.tif and masks/NUMBER.tif

Layout: the data set JessicaYuan/RefSegRS. Every line is a sample of its own; several may show the same picture.
"""

from pathlib import Path

from amltrain.data.annotations import Annotations, MaskFile
from amltrain.data.json_files import read_bytes
from amltrain.data.own import TableRow, build_annotations
from amltrain.data.specs import dataset_spec
from amltrain.errors import UserError
from amltrain.files import sha256


def read_refsegrs(root: Path, name: str) -> Annotations:
    """Read every split that is there. Raises UserError."""
    spec = dataset_spec(name)
    folder = root / spec.folder if (root / spec.folder).is_dir() else root
    paths = {split: folder / f"output_phrase_{split}.txt" for split in spec.splits}
    paths = {split: path for split, path in paths.items() if path.is_file()}
    if not paths:
        raise UserError(f"{folder} has no output_phrase_train.txt; put RefSegRS's files there")
    rows = [row for split, path in paths.items() for row in _rows(path, split, folder)]
    sources = {path.name: sha256(path) for path in paths.values()}
    used = spec._replace(splits=tuple(paths), published={s: spec.published[s] for s in paths})
    return build_annotations(rows, name, sources=sources, place=str(folder), spec=used)


def _rows(path: Path, split: str, folder: Path) -> list[TableRow]:
    rows = []
    for number, line in enumerate(read_bytes(path).decode(errors="replace").splitlines(), 1):
        if not line.strip():
            continue
        key, _, sentence = line.strip().partition(" ")
        if not key.isalnum() or not sentence:
            raise UserError(f"{path}, line {number}: {line[:80]!r} is not a file number and a sentence")
        mask = MaskFile((folder / "masks").resolve(), f"{key}.tif")
        rows.append(TableRow(f"line {number} of {path.name}", f"images/{key}.tif", (sentence.strip(),), mask, split))
    return rows
