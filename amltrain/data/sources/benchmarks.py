"""Readers of benchmarks that models are not trained on, one each: (root, name) -> Annotations.

GSEval (GroundingSuite, arXiv 2503.10596; Apache-2.0, images: COCO's terms): stuff, parts, one or several objects.

    <root>/GSEval/GroundingSuite-Eval.jsonl, <root>/GSEval/unlabeled2017/000000000267.jpg

A line: idx, image_path, class_id, label, caption (the sentence), box (x1, y1, x2, y2), segmentation {size, counts}.
Layout: hustvl/GroundingSuite, its GroundingSuite-Eval.jsonl and evaluator. The evaluator reports by `class_id` and does
not name the classes; here they are the categories "class 1" and so on. Acc@0.5 takes the box around the mask.

PBench (the data set tiiuae/PBench, whose card states no licence): expressions of five levels, and crowded scenes.

    <root>/PBench/data/level_0-*.parquet ... level_4-*.parquet, dense-*.parquet

A row: image, expression, masks: list of {size, counts}, one for each instance, maybe none; count, id. The instances
are one target here. The paper's F1 matches predicted instances with them; a model with one mask has none, so it is not
reported. Layout: the data set's card and eval/pbench.py of tiiuae/Falcon-Perception.

Ref-Adv-s (arXiv 2602.23898, the data set dddraxxx/ref-adv-s, which has a licence of its own): boxes only.

    <root>/ref-adv-s/data/*.parquet

A row: image, normal_caption, solution (x1, y1, x2, y2 in pixels), width, height, distractors. Layout: run.py and
report.py of dddraxxx/Ref-Adv, which score it by the number of distractors; here those are the categories. How the
Parquet files are named is not stated there; all below the folder are read.

NWPU-Refer (arXiv 2506.03583): aerial images, one, several or no target; sentences in English and Chinese.

    <root>/NWPU-Refer/new_refs(unc).p, new_instances.json, image/image/*.jpg (or image/*.jpg)

REFER's form, one ref for each target: refs of one image and split with the same sentences are one referent. The
authors' repository has no files; two public loaders of others agree on the names and keys. Neither shows how a sentence
without target is written: ann_id -1 is read as such, as in gRefCOCO, and an annotation without polygons is skipped as
broken. Sentences beside English ones that are not in ASCII are left out, as one of the loaders does.

The pictures of Parquet files are written to <folder>/images once, each named by its content.
"""

import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from amltrain.data.catalog import DatasetSpec, dataset_spec
from amltrain.data.segmentation import decode_mask, encode_mask
from amltrain.data.sources.annotations import Annotations, register_reader
from amltrain.data.sources.cells import parse_json, read_text, text_lines
from amltrain.data.sources.entries import check_entry, referred_ids
from amltrain.data.sources.frame import COCO_RULE, FrameRule
from amltrain.data.sources.own import TableRow, build_annotations
from amltrain.data.sources.refer import read_pair
from amltrain.errors import UserError, first_line
from amltrain.files import replacing, sha256

_AS_DECODED = FrameRule("upright")
"""`datasets` turns a picture upright when it decodes it, and that is what the authors' code sees."""


def _folder(root: Path, spec: DatasetSpec) -> Path:
    return root / spec.folder if (root / spec.folder).is_dir() else root


@register_reader("gseval")
def read_gseval(root: Path, name: str) -> Annotations:
    """Read the lines of GroundingSuite-Eval.jsonl. Raises UserError."""
    spec = dataset_spec(name)
    folder = _folder(root, spec)
    path = folder / "GroundingSuite-Eval.jsonl"
    if not path.is_file():
        raise UserError(f"{folder} has no {path.name}; put GSEval's files there ({spec.source})")
    lines = enumerate(text_lines(read_text(path)), 1)
    rows = [_gseval_row(line, number, path) for number, line in lines if line.strip()]
    return build_annotations(rows, name, sources={path.name: sha256(path)}, place=str(path), spec=spec, rule=COCO_RULE)


_GSEVAL = ("idx", "image_path", "class_id", "caption", "segmentation")


def _gseval_row(line: str, number: int, path: Path) -> TableRow:
    place = f"line {number}"
    entry = parse_json(line, f"{path}, {place}")
    missing = [key for key in _GSEVAL if not isinstance(entry, dict) or key not in entry]
    if missing:
        raise UserError(f"{path}: {place} has no {missing[0]!r}; a line of GSEval has {', '.join(_GSEVAL)}")
    for key, kind in (("idx", int), ("image_path", str), ("class_id", int), ("caption", str), ("segmentation", dict)):
        if type(entry[key]) is not kind:
            raise UserError(f"{path}: {place} has a {key!r} that is no {kind.__name__}; download the file again")
    category = f"class {entry['class_id']}"
    caption, mask = (entry["caption"].strip(),), entry["segmentation"]
    return TableRow(place, entry["image_path"], caption, mask, "test", entry["idx"], category=category)


@register_reader("pbench")
def read_pbench(root: Path, name: str) -> Annotations:
    """Read the levels that are there, and write out their pictures. Raises UserError."""
    spec = dataset_spec(name)
    folder = _folder(root, spec)
    shards = {
        split: sorted([*folder.glob(f"data/{split}-*.parquet"), *folder.glob(f"{split}-*.parquet")])
        for split in spec.splits
    }
    shards = {split: found for split, found in shards.items() if found}
    if not shards:
        raise UserError(f"{folder} has no data/level_0-*.parquet; put PBench's files there ({spec.source})")
    rows: list[TableRow] = []
    for split, paths in shards.items():
        for path in paths:
            for place, row in _parquet_rows(path, ("image", "expression", "masks")):
                rows.append(_pbench_row(row, place, path, split, len(rows), folder / "images"))
    used = spec._replace(splits=tuple(shards), published={split: spec.published[split] for split in shards})
    sources = {path.name: sha256(path) for paths in shards.values() for path in paths}
    return build_annotations(rows, name, sources=sources, place=str(folder), spec=used, rule=_AS_DECODED)


def _pbench_row(row: dict[str, Any], place: str, path: Path, split: str, number: int, images: Path) -> TableRow:
    picture = _write_picture(row, place, path, images)
    if not isinstance(row["expression"], str) or not isinstance(row["masks"], list):
        raise UserError(f"{path}: {place} has an expression that is no text, or no list of masks; download it again")
    mask = None
    if row["masks"]:
        try:
            mask = encode_mask(_joint_mask(row["masks"]))
        except UserError as error:
            raise UserError(f"{path}: {place} has masks that cannot be joined ({first_line(error)})") from error
    return TableRow(f"{place} of {path.name}", picture, (row["expression"].strip(),), mask, split, number)


def _joint_mask(instances: list[dict[str, Any]]) -> NDArray[np.uint8]:
    """The pixels of any instance, [height, width], one decoded at a time. Raises UserError."""
    joint = decode_mask(instances[0])
    for instance in instances[1:]:
        mask = decode_mask(instance)
        if mask.shape != joint.shape:
            raise UserError(f"their sizes are {joint.shape} and {mask.shape}")
        joint |= mask
    return joint


@register_reader("ref-adv-s")
def read_ref_adv(root: Path, name: str) -> Annotations:
    """Read the Parquet files, and write out their pictures. Raises UserError."""
    spec = dataset_spec(name)
    folder = _folder(root, spec)
    paths = sorted([*folder.glob("data/*.parquet"), *folder.glob("*.parquet")])
    if not paths:
        raise UserError(f"{folder} has no data/*.parquet; put Ref-Adv-s's files there ({spec.source})")
    columns = ("image", "normal_caption", "solution", "width", "height", "distractors")
    rows: list[TableRow] = []
    for path in paths:
        for place, row in _parquet_rows(path, columns):
            rows.append(_ref_adv_row(row, place, path, len(rows), folder / "images"))
    sources = {path.name: sha256(path) for path in paths}
    return build_annotations(rows, name, sources=sources, place=str(folder), spec=spec, rule=_AS_DECODED)


def _ref_adv_row(row: dict[str, Any], place: str, path: Path, number: int, images: Path) -> TableRow:
    check_entry(row, ("width", "height"), place, str(path))
    box = row["solution"]
    numbers = isinstance(box, list) and len(box) == 4 and all(isinstance(c, (int, float)) for c in box)
    if not numbers or not all(map(math.isfinite, box)) or box[0] >= box[2] or box[1] >= box[3]:
        raise UserError(f"{path}: {place} has a 'solution' that is not x1 < x2 and y1 < y2 in pixels")
    if not isinstance(row["normal_caption"], str):
        raise UserError(f"{path}: {place} has a 'normal_caption' that is no text; download it again")
    picture = _write_picture(row, place, path, images)
    left, top, right, bottom = map(float, box)
    corners = [[left, top, right, top, right, bottom, left, bottom]]
    return TableRow(
        f"{place} of {path.name}",
        picture,
        (row["normal_caption"].strip(),),
        corners,
        "test",
        number,
        category=_distractors(row["distractors"]),
        box=(left, top, right - left, bottom - top),
        size=(row["height"], row["width"]),
    )


def _distractors(value: Any) -> str:
    """The group of the paper's table; empty where the number cannot be told. value: a number, a list, or its JSON."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return ""
    count = len(value) if isinstance(value, list) else value
    if type(count) is not int or count < 2:
        return ""
    return "2-3 distractors" if count < 4 else "4-6 distractors" if count < 7 else "7 or more distractors"


def _parquet_rows(path: Path, columns: Sequence[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Name and content of every row. Raises UserError for an absent column, and for a file that cannot be read."""
    try:
        parquet = pq.ParquetFile(path)
        named = parquet.schema_arrow.names
        missing = [column for column in columns if column not in named]
        if missing:
            raise UserError(
                f"{path} has no column {missing[0]!r}; expected are {', '.join(columns)}, it has {', '.join(named)}"
            )
        number = 0
        for batch in parquet.iter_batches(batch_size=16, columns=list(columns)):
            for row in batch.to_pylist():
                yield f"row {number}", row
                number += 1
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path} cannot be read ({first_line(error)}); download it again") from error


def _write_picture(row: dict[str, Any], place: str, path: Path, images: Path) -> str:
    """Write a row's picture under a name made of its content, once; return the name."""
    content = row["image"].get("bytes") if isinstance(row["image"], dict) else None
    if not content:
        raise UserError(f"{path}: {place} has no bytes of an image; download it again")
    ending = "png" if content.startswith(b"\x89PNG") else "jpg"  # what it is, its bytes tell
    target = images / f"{hashlib.sha256(content).hexdigest()[:20]}.{ending}"
    if not target.is_file():
        images.mkdir(exist_ok=True)
        with replacing(target) as temporary:
            temporary.write_bytes(content)
    return target.name


@register_reader("nwpu-refer")
def read_nwpu_refer(root: Path, name: str) -> Annotations:
    """Read the refs, and join those of one image and split that have the same sentences. Raises UserError."""
    spec = dataset_spec(name)
    folder = _folder(root, spec)
    pairs = (("new_refs(unc).p", "new_instances.json"), ("refs(unc).p", "instances.json"))
    found = [(folder / refs, folder / instances) for refs, instances in pairs if (folder / refs).is_file()]
    if not found:
        raise UserError(f"{folder} has no new_refs(unc).p; put NWPU-Refer's files there ({spec.source})")
    if not found[0][1].is_file():
        raise UserError(f"{folder} has no {found[0][1].name}; put NWPU-Refer's files there ({spec.source})")
    files = read_pair(*found[0], name)
    refs, foreign = _english(files.refs)
    notes = (f"{foreign} sentences that are not English were left out",) if foreign else ()
    return files._replace(refs=_joined(refs), notes=(*files.notes, *notes))


def _text(sentence: dict[str, Any]) -> str:
    return str(sentence.get("raw") or sentence.get("sent") or "").strip()


def _english(refs: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], int]:
    """Refs with their sentences in ASCII alone, where they have any, and the number of those left out."""
    kept, left_out = [], 0
    for ref in refs:
        plain = [sentence for sentence in ref["sentences"] if _text(sentence).isascii()]
        sentences = plain or ref["sentences"]
        left_out += len(ref["sentences"]) - len(sentences)
        kept.append({**ref, "sentences": sentences})
    return kept, left_out


def _joined(refs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One ref for each image, split and set of sentences, with the annotations of all."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for ref in refs:
        key = (ref["image_id"], ref["split"], tuple(map(_text, ref["sentences"])))
        groups.setdefault(key, []).append(ref)
    joined = []
    for group in groups.values():
        ids = list(dict.fromkeys(number for ref in group for number in referred_ids(ref)))
        joined.append({**group[0], "ann_id": ids or -1})
    return joined
