"""Find out in which form annotations lie at a path. Several answers are a question, which `--form` answers."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from amltrain.data.sources.coco_export import coco_files, read_coco_export
from amltrain.data.sources.cvat import cvat_file, read_cvat
from amltrain.data.sources.fiftyone_export import read_fiftyone
from amltrain.data.sources.label_studio import read_label_studio
from amltrain.data.sources.labelme import read_labelme
from amltrain.data.sources.objects import Imported, ImportOptions
from amltrain.data.sources.pictures import is_picture
from amltrain.data.sources.voc import read_voc, voc_root
from amltrain.data.sources.yolo import read_yolo, yolo_file
from amltrain.errors import UserError

OWN_FORMS = ("table", "folder", "hf")
"""Forms that hold sentences themselves, read by `table`, `folder` and `hf_table`. `catalog.FORM_NAMES` has all."""


class Form(NamedTuple):
    """title: for messages. read: the importer."""

    title: str
    read: Callable[[Path, ImportOptions], Imported]


FORMS: dict[str, Form] = {
    "labelme": Form("LabelMe (a JSON file per picture)", read_labelme),
    "cvat": Form("CVAT for images (XML)", read_cvat),
    "label-studio": Form("Label Studio (JSON)", read_label_studio),
    "yolo": Form("YOLO (data.yaml and text files)", read_yolo),
    "coco": Form("COCO (JSON; also Roboflow, CVAT, FiftyOne)", read_coco_export),
    "voc": Form("Pascal VOC", read_voc),
    "fiftyone": Form("FiftyOne (samples.json)", read_fiftyone),
}


class Found(NamedTuple):
    """A form, and the file or folder in which it was seen."""

    form: str
    evidence: str


def detect(path: Path) -> Found:
    """The one form of the annotations at a path. Raises UserError for none and for several."""
    if not path.exists():
        raise UserError(f"there is no {path}")
    found = _in_file(path) if path.is_file() else _in_folder(path)
    forms = list(dict.fromkeys(entry.form for entry in found))
    if len(forms) == 1:
        return found[0]
    known = ", ".join((*FORMS, *OWN_FORMS))
    if not forms:
        pictures = sum(map(is_picture, path.rglob("*"))) if path.is_dir() else 0
        if pictures:
            raise UserError(
                f"{path} has {pictures:,} picture{'' if pictures == 1 else 's'} and no annotations that are known "
                f"({known}); outline the objects in an annotation tool, or write a table (docs/data.md)"
            )
        if path.is_dir() and not any(path.iterdir()):
            raise UserError(f"{path} is an empty folder; give the one with your pictures and annotations")
        raise UserError(f"{path} is in no form that is known; name it: --form, one of {known}")
    seen = " and ".join(f"{form} ({next(e.evidence for e in found if e.form == form)})" for form in forms)
    raise UserError(f"{path} can be read as {seen}; choose one with --form")


def _in_file(path: Path) -> list[Found]:
    kind = path.suffix.lower()
    if kind in (".csv", ".tsv", ".jsonl", ".parquet"):
        return [Found("table", path.name)]
    if kind == ".xml" and cvat_file(path):
        return [Found("cvat", path.name)]
    if kind in (".yaml", ".yml") and yolo_file(path):
        return [Found("yolo", path.name)]
    return _in_json(path) if kind == ".json" else []


def _in_json(path: Path) -> list[Found]:
    """The form of a JSON file by the keys near its start and end; a list is looked at whole where it is short."""
    with path.open("rb") as file:
        start = file.read(1 << 16)
        file.seek(0, 2)
        file.seek(max(0, file.tell() - (1 << 16)))
        both = start + file.read()
    first = start.lstrip(b"\xef\xbb\xbf \t\r\n")[:1]
    if first == b"[":
        pairs = ((b'"annotations"', b'"data"'), (b'"annotator"', b'"annotation_id"'))
        studio = any(one in both and other in both for one, other in pairs)
        return [Found("label-studio" if studio else "table", path.name)]
    if first != b"{":
        return []
    if b'"samples"' in both and b'"filepath"' in both:
        return [Found("fiftyone", path.name)]
    if b'"shapes"' in both and (b'"imagePath"' in both or b'"imageData"' in both):
        return [Found("labelme", path.name)]
    return [Found("coco", path.name)] if coco_files(path) else []


def _in_folder(path: Path) -> list[Found]:
    found: list[Found] = []
    if (file := cvat_file(path)) is not None:
        found.append(Found("cvat", file.name))
    if (file := yolo_file(path)) is not None:
        found.append(Found("yolo", file.name))
    if (folder := voc_root(path)) is not None and not found:
        found.append(Found("voc", f"{folder.name}/"))
    for file in [*sorted(path.glob("*.json")), *sorted(path.glob("*/*.json"))][:200]:
        found += [entry for entry in _in_json(file) if not _only_about(file)]
    for file in sorted(path.iterdir()):
        if file.is_file() and file.suffix.lower() in (".csv", ".tsv", ".jsonl") and not found:
            found.append(Found("table", file.name))
    if any(path.rglob("*.parquet")) and not found:
        found.append(Found("hf", "Parquet files"))
    if not found and _has_pairs(path):
        found.append(Found("folder", "pictures with text files"))
    return found


def _only_about(file: Path) -> bool:
    """Whether a JSON file only describes a data set (metadata.json, dataset_info.json)."""
    return file.stem in ("metadata", "dataset_info", "dataset_infos", "state", "manifest")


def _has_pairs(path: Path) -> bool:
    """Whether some picture has a text file of its name beside it or in texts/."""
    texts = {file.stem for file in path.rglob("*.txt")}
    return any(file.stem in texts for file in path.rglob("*") if is_picture(file))


def read_form(path: Path, form: str, options: ImportOptions) -> Imported:
    """Read a path in a form of FORMS. Raises UserError for one that is unknown."""
    if form not in FORMS:
        raise UserError(f"--form {form!r} is not known; known: {', '.join((*FORMS, *OWN_FORMS))}")
    return FORMS[form].read(path, options)
