"""Readers of the original files: REFER's `refs(unc|umd|google).p`, gRefCOCO's `grefs(unc).json`, `instances.json`.

Layout and rules: lichengunc/refer (commit e3bbaa3) and henghuiding/gRefCOCO (commit 41a8f00). A ref's own `file_name`
is not a file on disk; the image's is. RRSIS-D, RefCLEF, Ref-ZOM and R-RefCOCO use the same layout.

REFER annotations as they are most often found on the Hub: one row per referent, images not included.

jxu124/refcoco, jxu124/refcocoplus and jxu124/refcocog (umd) are the original files in Parquet. Of a row are used:

    ref_id, ann_id, image_id   integers, as in the original files
    split                      the original split (the Hub's own split names differ: its `test` is RefCOCO's testA)
    sentences                  list of {sent_id, sent, raw, tokens}
    raw_anns                   JSON: the COCO annotation with id, segmentation, bbox (x, y, width, height), category_id
    raw_image_info             JSON: the COCO image with id, file_name, height, width
    image_path                 coco/train2014/COCO_train2014_000000581857.jpg
"""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets

from amltrain.data.catalog import dataset_spec
from amltrain.data.sources.annotations import Annotations, register_reader
from amltrain.data.sources.entries import by_id, check_refs, referred_ids
from amltrain.data.sources.frame import FrameRule
from amltrain.errors import UserError
from amltrain.files import load_json, load_pickle, sha256


def refer_paths(root: Path, dataset: str) -> tuple[Path, Path]:
    """Return the paths of a data set's refs and instances under a REFER root. Raises UserError if one is missing."""
    spec = dataset_spec(dataset)
    folder = root / spec.folder
    candidates = [folder / f"{spec.refs_name}{ending}" for ending in (".p", ".json")]
    refs_path = next((path for path in candidates if path.is_file()), None)
    instances_path = folder / "instances.json"
    if refs_path is None or not instances_path.is_file():
        wanted = candidates[spec.generalised] if refs_path is None else instances_path
        raise UserError(
            f"{folder} has no {wanted.name}; put {dataset}'s original files there (docs/data.md lists the sources)"
        )
    return refs_path, instances_path


@register_reader("refer")
def read_refer(root: Path, dataset: str) -> Annotations:
    """Read the files of `dataset` under a REFER root. Raises UserError that names the file and what is missing."""
    return read_pair(*refer_paths(root, dataset), dataset)


def read_pair(refs_path: Path, instances_path: Path, dataset: str) -> Annotations:
    """Read a file of refs and its COCO annotations. Raises UserError."""
    spec = dataset_spec(dataset)
    refs = load_pickle(refs_path) if refs_path.suffix == ".p" else load_json(refs_path)
    instances = load_json(instances_path)
    for key in ("images", "annotations", "categories"):
        if not isinstance(instances, dict) or not isinstance(instances.get(key), list):
            raise UserError(f"{instances_path} has no list {key!r}; it should be {dataset}'s instances.json")
    if not isinstance(refs, list):
        raise UserError(f"{refs_path} holds a {type(refs).__name__}, not a list of refs")
    check_refs(refs, spec, dataset, str(refs_path))
    place = str(instances_path)
    images = {ref["image_id"] for ref in refs}
    annotations = {number for ref in refs for number in referred_ids(ref)}
    return Annotations(
        dataset,
        spec,
        refs,
        by_id(instances["images"], "image", ("file_name", "height", "width"), place, images),
        by_id(instances["annotations"], "annotation", ("segmentation", "bbox", "category_id"), place, annotations),
        {key: entry["name"] for key, entry in by_id(instances["categories"], "category", ("name",), place).items()},
        {path.name: sha256(path) for path in (refs_path, instances_path)},
        place,
        rule=FrameRule("stored", spec.stretch),
    )


_COCO_2014 = re.compile(r"COCO_(?:train|val)2014_(\d{12})\.jpg")


def names_of_2017(files: Annotations) -> Annotations | None:
    """The files with COCO 2017's names of the same pictures; None where some name is not one of 2014."""
    images = {}
    for image_id, image in files.images.items():
        match = _COCO_2014.fullmatch(image["file_name"])
        if match is None:
            return None
        images[image_id] = {**image, "file_name": f"{match[1]}.jpg"}
    return files._replace(images=images, notes=(*files.notes, "the pictures have the names of COCO 2017"))


COLUMNS = ("ref_id", "ann_id", "image_id", "split", "sentences", "raw_anns", "raw_image_info", "image_path")


def read_hub_schema(source: str, dataset: str) -> Annotations:
    """Read the annotations of `dataset` from a Hub data set id or a folder with the same Parquet files.

    Returns what `read_refer` returns. Raises UserError naming the source and the row.
    """
    spec = dataset_spec(dataset)
    refs: list[dict[str, Any]] = []
    images: dict[int, dict[str, Any]] = {}
    annotations: dict[int, dict[str, Any]] = {}
    for number, row in enumerate(_rows(source)):
        place = f"{source}, row {number}"
        if not row["image_path"]:
            raise UserError(f"{place}: image_path is empty; download the data set again")
        image = {**_json(row, "raw_image_info", place), "file_name": Path(row["image_path"]).name}
        annotation = _json(row, "raw_anns", place)
        images |= by_id([image], "image", ("file_name", "height", "width"), place)
        annotations |= by_id([annotation], "annotation", ("segmentation", "bbox", "category_id"), place)
        refs.append({key: row[key] for key in ("ref_id", "ann_id", "image_id", "split", "sentences")})
    check_refs(refs, spec, dataset, source)
    content = json.dumps([refs, sorted(images.items()), sorted(annotations.items())], sort_keys=True)
    digest = hashlib.sha256(content.encode()).hexdigest()
    name = Path(source).name if Path(source).is_dir() else source
    return Annotations(dataset, spec, refs, images, annotations, _coco_categories(), {name: digest}, source)


def check_source(source: str) -> None:
    """Raise UserError if a Hub data set cannot be reached, or a folder has no data. Reads no row."""
    with _reaching(source):
        datasets.load_dataset_builder(source)


@contextmanager
def _reaching(source: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # the library raises its own types besides OSError and ValueError
        raise UserError(
            f"could not read {source} ({' '.join(str(error).split())}); give a Hub data set id that can be reached, or "
            f"a folder with its Parquet files"
        ) from error


def _rows(source: str) -> Iterable[dict[str, Any]]:
    """The rows of all splits, one split after the other."""
    with _reaching(source):
        splits = datasets.load_dataset(source, trust_remote_code=False)
    for name, rows in splits.items():
        missing = [column for column in COLUMNS if column not in rows.column_names]
        if missing:
            raise UserError(
                f"{source} ({name}) has no column {missing[0]!r}; its rows should be referents, as in jxu124/refcoco"
            )
        yield from rows.select_columns(list(COLUMNS))


def _json(row: dict[str, Any], column: str, place: str) -> dict[str, Any]:
    try:
        entry = json.loads(row[column]) if isinstance(row[column], str) else row[column]
    except json.JSONDecodeError as error:
        raise UserError(f"{place}: {column} is no JSON ({error}); download the data set again") from error
    if not isinstance(entry, dict):
        raise UserError(f"{place}: {column} is no JSON object; download the data set again")
    return entry


def _coco_categories() -> dict[int, str]:
    """COCO's names by id, 1 to 90; the rows hold ids alone."""
    from torchvision.models.detection import MaskRCNN_ResNet50_FPN_Weights  # takes a second

    return dict(enumerate(MaskRCNN_ResNet50_FPN_Weights.COCO_V1.meta["categories"]))
