"""PhraseCut (arXiv 2008.01187): phrases about regions of Visual Genome, several instances each.

    <root>/VGPhraseCut_v0/refer_train.json, refer_val.json, refer_miniv.json, refer_test.json
    <root>/VGPhraseCut_v0/images/<image_id>.jpg

An entry: task_id, image_id, phrase, Polygons (per instance a list of polygons, each a list of [x, y]), instance_boxes.
Layout: ChenyunWu/PhraseCutDataset. The whole val split is refer_val.json and refer_miniv.json (100 images) together.

ReasonSeg (LISA, arXiv 2308.00692): questions that need reasoning, one image and one labelme file each.

    <root>/ReasonSeg/train|val|test/X.jpg and X.json

A file: `text` (the sentences), `is_sentence`, `shapes` with `label` and `points`. Shapes are filled from large to
small, as in the official code: `target` is foreground; `ignore` marks pixels that LISA leaves out of the
score and that are background here; `flag` is unused. Outlines count as filled.

RefCOCO-M (the data set moondream/refcoco-m): RefCOCO's val with masks made again; Parquet files with their images.

    <root>/refcoco-m/data/validation-*.parquet

A row: image, image_id, file_name, samples: list of {id, category, sentences, bbox, mask: {counts, size}}. The images
are written to <root>/refcoco-m/images once, from where they are prepared like any others.

RefSegRS (arXiv 2306.08625): sentences about aerial images.

    <root>/RefSegRS/output_phrase_train.txt, output_phrase_val.txt, output_phrase_test.txt: lines of "NUMBER SENTENCE"
    <root>/RefSegRS/images/NUMBER.tif and masks/NUMBER.tif

Layout: the data set JessicaYuan/RefSegRS. Every line is a sample of its own; several may show the same picture.

Readers of data sets that are not in the REFER layout, one file each: (root, name) -> Annotations.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, ImageDraw

from amltrain.data.catalog import dataset_spec
from amltrain.data.segmentation import MAX_PIXELS, encode_mask
from amltrain.data.sources.annotations import Annotations, MaskFile, register_reader
from amltrain.data.sources.entries import check_entry
from amltrain.data.sources.own import TableRow, build_annotations
from amltrain.errors import UserError, first_line
from amltrain.files import load_json, read_bytes, sha256

_FILES = {"train": ("train",), "val": ("val", "miniv"), "test": ("test",)}


@register_reader("phrasecut")
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
        rows += _phrasecut_rows(path, split, first=len(rows))
    sources = {path.name: sha256(path) for path in paths}
    splits = tuple(dict.fromkeys(paths.values()))
    used = spec._replace(splits=splits, published={split: spec.published[split] for split in splits})
    return build_annotations(rows, name, sources=sources, place=str(folder), spec=used)


def _phrasecut_rows(path: Path, split: str, first: int) -> list[TableRow]:
    """Rows of a file; refs are numbered from `first` on, because phrases have text ids."""
    entries = load_json(path)
    if not isinstance(entries, list):
        raise UserError(f"{path} holds a {type(entries).__name__}, not a list of phrases")
    return [_phrasecut_row(entry, number, path, split, first + number) for number, entry in enumerate(entries)]


def _phrasecut_row(entry: Any, number: int, path: Path, split: str, ref_id: int) -> TableRow:
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


@register_reader("reasonseg")
def read_reasonseg(root: Path, name: str) -> Annotations:
    """Read every split that is there. Raises UserError."""
    import hashlib

    spec = dataset_spec(name)
    folder = root / spec.folder if (root / spec.folder).is_dir() else root
    files = {split: sorted((folder / split).glob("*.json")) for split in spec.splits}
    files = {split: paths for split, paths in files.items() if paths}
    if not files:
        raise UserError(f"{folder} has no train/*.json; put ReasonSeg's folders there")
    ignored = 0
    rows = []
    without: list[str] = []
    digest = hashlib.sha256()
    for split, paths in files.items():
        for path in paths:
            content = load_json(path, encodings=("utf-8", "cp1252"))
            digest.update(f"{split}/{path.name} {content}".encode(errors="replace"))
            if isinstance(content, dict) and "text" in content and not _targets(content.get("shapes")):
                without.append(f"{split}/{path.name}")
                continue
            row, has_ignored = _reasonseg_row(content, path, split)
            rows.append(row)
            ignored += has_ignored
    notes: tuple[str, ...] = (f"{ignored} images have `ignore` regions; here they are background",) if ignored else ()
    if without:
        notes = (*notes, f"{len(without)} files as published have no target shape and were left out ({without[0]})")
    used = spec._replace(splits=tuple(files), published={s: spec.published[s] for s in files})
    sources = {spec.folder: digest.hexdigest()}
    return build_annotations(rows, name, sources=sources, place=str(folder), spec=used, notes=notes)


def _targets(shapes: Any) -> bool:
    """Whether some shape is a target; what is no list of shapes is named where it is read."""
    if shapes is None:
        return False
    if not isinstance(shapes, list):
        return True
    return any(not isinstance(s, dict) or "target" in str(s.get("label", "target")).lower() for s in shapes)


def _reasonseg_row(content: Any, path: Path, split: str) -> tuple[TableRow, bool]:
    check_entry(content, ("text", "shapes"), "the file", str(path))
    texts = content["text"] if isinstance(content["text"], list) else [content["text"]]
    if not all(isinstance(text, str) for text in texts):
        raise UserError(f"{path}: `text` is not a list of texts")
    image = path.with_suffix(".jpg")
    size = _size(image)
    mask, ignored = _mask(content["shapes"], size, path)
    row = TableRow(path.name, f"{split}/{image.name}", tuple(texts), mask, split, size=size)
    return row, ignored


def _size(image: Path) -> tuple[int, int]:
    try:
        if not image.is_file():
            raise UserError(f"{image} is missing")
        with Image.open(image) as opened:
            size = (opened.height, opened.width)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{image} is damaged ({first_line(error)})") from error
    if size[0] * size[1] > MAX_PIXELS:
        raise UserError(f"{image} has {size[1]} x {size[0]} pixels, which is too large")
    return size


def _mask(shapes: Any, size: tuple[int, int], path: Path) -> tuple[dict[str, Any], bool]:
    """The target as run lengths, and whether some region is to be ignored."""
    drawn: list[tuple[int, np.ndarray, bool]] = []
    for number, shape in enumerate(shapes if isinstance(shapes, list) else ()):
        check_entry(shape, ("label", "points"), f"shape {number}", str(path))
        label = str(shape["label"]).lower()
        if label == "flag":
            continue
        if "target" not in label and "ignore" not in label:
            raise UserError(f"{path}: shape {number} has the label {shape['label']!r}, not target or ignore")
        try:
            points = [(int(x), int(y)) for x, y in shape["points"]]
        except (TypeError, ValueError, OverflowError) as error:
            raise UserError(f"{path}: shape {number} has points that are not coordinates") from error
        limit = 4 * max(size)
        if len(points) < 2 or any(abs(c) > limit for point in points for c in point):
            raise UserError(f"{path}: shape {number} has too few points, or points far outside the image")
        canvas = Image.new("1", (size[1], size[0]))
        ImageDraw.Draw(canvas).polygon(points, fill=1, outline=1)
        region = np.asarray(canvas)
        drawn.append((int(region.sum()), region, "ignore" in label))
    mask = np.zeros(size, np.uint8)
    for _, region, ignore in sorted(drawn, key=lambda entry: -entry[0]):
        mask[region] = 0 if ignore else 1
    return encode_mask(mask), any(ignore for _, _, ignore in drawn)


_COLUMNS = ("image", "image_id", "file_name", "samples")


@register_reader("refcoco-m")
def read_refcoco_m(root: Path, name: str) -> Annotations:
    """Read the Parquet files and write out their images. Raises UserError."""
    spec = dataset_spec(name)
    folder = root / spec.folder if (root / spec.folder).is_dir() else root
    shards = sorted([*folder.glob("data/validation-*.parquet"), *folder.glob("validation-*.parquet")])
    if not shards:
        raise UserError(f"{folder} has no data/validation-*.parquet; put RefCOCO-M's files there")
    rows = []
    for shard in shards:
        try:
            rows += _refcoco_m_rows(shard, folder / "images")
        except (pa.ArrowException, OSError) as error:
            raise UserError(f"{shard} cannot be read ({first_line(error)}); download it again") from error
    sources = {shard.name: sha256(shard) for shard in shards}
    return build_annotations(rows, name, sources=sources, place=str(folder), spec=spec)


def _refcoco_m_rows(shard: Path, images: Path) -> list[TableRow]:
    parquet = pq.ParquetFile(shard)
    missing = [column for column in _COLUMNS if column not in parquet.schema_arrow.names]
    if missing:
        raise UserError(f"{shard} has no column {missing[0]!r}; it has {', '.join(parquet.schema_arrow.names)}")
    rows: list[TableRow] = []
    images.mkdir(exist_ok=True)
    number = 0
    for batch in parquet.iter_batches(batch_size=64, columns=list(_COLUMNS)):
        for row in batch.to_pylist():
            rows += _refcoco_m_row(row, f"row {number}", shard, images)
            number += 1
    return rows


def _refcoco_m_row(row: dict[str, Any], place: str, shard: Path, images: Path) -> list[TableRow]:
    check_entry(row, ("image_id", "file_name"), place, str(shard))
    content = (row["image"] or {}).get("bytes")
    if not content or not isinstance(row["samples"], list):
        raise UserError(f"{shard}: {place} has no image or no samples; download it again")
    name = Path(row["file_name"]).name
    path = images / name
    if not path.exists():
        path.write_bytes(content)
    found = []
    for sample in row["samples"]:
        check_entry(sample, ("id", "sentences", "mask"), f"a sample of {place}", str(shard))
        texts = tuple(text for text in sample["sentences"] if isinstance(text, str))
        box = tuple(sample.get("bbox") or ())
        category = str(sample.get("category") or "")
        where = f"{place} of {shard.name}"
        box = box if len(box) == 4 else ()
        mask, ref_id = sample["mask"], sample["id"]
        found.append(TableRow(where, name, texts, mask, "val", ref_id, row["image_id"], category, box))
    return found


@register_reader("refsegrs")
def read_refsegrs(root: Path, name: str) -> Annotations:
    """Read every split that is there. Raises UserError."""
    spec = dataset_spec(name)
    folder = root / spec.folder if (root / spec.folder).is_dir() else root
    paths = {split: folder / f"output_phrase_{split}.txt" for split in spec.splits}
    paths = {split: path for split, path in paths.items() if path.is_file()}
    if not paths:
        raise UserError(f"{folder} has no output_phrase_train.txt; put RefSegRS's files there")
    rows = [row for split, path in paths.items() for row in _refsegrs_rows(path, split, folder)]
    sources = {path.name: sha256(path) for path in paths.values()}
    used = spec._replace(splits=tuple(paths), published={s: spec.published[s] for s in paths})
    return build_annotations(rows, name, sources=sources, place=str(folder), spec=used)


def _refsegrs_rows(path: Path, split: str, folder: Path) -> list[TableRow]:
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
