"""Label Studio: its JSON (tasks with annotations and results) and JSON-MIN (a flat row per task).

A result: type (brushlabels, polygonlabels, rectanglelabels, ellipselabels and the same without `labels`), value in
percent of original_width and original_height, and an id; results of one id are one region: its label, its area, and a
text area with its sentences. Results of relations and whole-image choices are left out. Label Studio shows pictures
upright. Of several annotations of a task the one marked ground_truth is used, else the first that was not cancelled.
"""

from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from amltrain.data.segmentation import BrokenSegmentationError, encode_mask
from amltrain.data.sources.cells import clean_sentence, parse_json, read_text, split_name
from amltrain.data.sources.frame import FrameRule, Size
from amltrain.data.sources.mask_forms import brush_mask
from amltrain.data.sources.objects import (
    Counted,
    Digest,
    Imported,
    ImportOptions,
    ellipse,
    find_picture,
    joined,
    label_of,
    numbers,
    point_pairs,
    rectangle,
    sentences_of,
    stated_size,
    turned,
)
from amltrain.data.sources.own import TableRow
from amltrain.data.sources.pictures import PictureFinder
from amltrain.errors import UserError

_AREAS = ("brush", "polygon", "rectangle", "ellipse")
_IMAGE_KEYS = ("image", "img", "picture", "photo", "url", "image_url")


def is_label_studio(content: Any) -> bool:
    """Whether a JSON file's content is Label Studio's, full or minimal."""
    first = content[0] if isinstance(content, list) and content else None
    if not isinstance(first, dict):
        return False
    return ("data" in first and bool({"annotations", "completions"} & first.keys())) or (
        "annotator" in first and "annotation_id" in first
    )


def read_label_studio(path: Path, options: ImportOptions) -> Imported:
    """Read one exported JSON file, or those of a folder. Raises UserError that names task and result."""
    files = sorted(path.glob("*.json")) if path.is_dir() else [path]
    root = options.images or _image_folder(path if path.is_dir() else path.parent)
    finder, counted, digest = PictureFinder(root, by_base_name=True), Counted(), Digest()
    rows: list[TableRow] = []
    read = 0
    for file in files:
        text = read_text(file, options.encoding)
        tasks = parse_json(text, str(file))
        if not is_label_studio(tasks):
            continue
        read += 1
        digest.add(file.name, text.encode(errors="replace"))
        for number, task in enumerate(tasks):
            where = f"{file}, task {task.get('id', number) if isinstance(task, dict) else number}"
            if not isinstance(task, dict):
                raise UserError(f"{where} is a {type(task).__name__}, not an object")
            rows += _task_rows(task, where, finder, counted)
    if not read:
        raise UserError(f"{path} is not an export of Label Studio (a list of tasks with data and annotations)")
    return Imported(rows, root, {path.name: digest.hexdigest()}, counted.notes(), FrameRule("upright"))


def _image_folder(folder: Path) -> Path:
    return folder / "images" if (folder / "images").is_dir() else folder


def _task_rows(task: dict[str, Any], where: str, finder: PictureFinder, counted: Counted) -> list[TableRow]:
    data = task["data"] if isinstance(task.get("data"), dict) else task
    address = next((data[key] for key in _IMAGE_KEYS if isinstance(data.get(key), str)), None)
    if address is None:
        raise UserError(f"{where} has no picture (data.image); it has {', '.join(map(str, data))[:200]}")
    results = _results(task, where, counted) if data is not task else _minimal_results(task)
    regions: dict[str, dict[str, Any]] = {}
    for number, result in enumerate(results):
        at = f"{where}, result {number}"
        if not isinstance(result, dict):
            raise UserError(f"{at} is a {type(result).__name__}, not an object")
        _add_result(result, regions, at, counted)
    areas = [region for region in regions.values() if region["parts"]]
    if not areas:
        return []
    image = _find(finder, address, where)
    split = split_name(data.get("split")) if isinstance(data.get("split"), str) else None
    return [
        TableRow(
            place=f"region {region['id']} of {where.rpartition(', ')[2]}",
            image=image,
            sentences=tuple(dict.fromkeys(region["texts"])),
            segmentation=joined(region["parts"], region["size"]),
            split=split,
            category=region["label"],
            size=region["size"],
        )
        for region in areas
    ]


def _results(task: dict[str, Any], where: str, counted: Counted) -> list[Any]:
    """Results of the task's one annotation that counts."""
    given = task.get("annotations", task.get("completions")) or []
    if not isinstance(given, list):
        raise UserError(f"{where}: 'annotations' is not a list")
    usable = [a for a in given if isinstance(a, dict) and not a.get("was_cancelled")]
    truths = [a for a in usable if a.get("ground_truth")]
    if len(usable) > 1 and len(truths) != 1:
        counted.add("tasks have several annotations; the first was used", where.rpartition(", ")[2])
    chosen = (truths or usable)[:1]
    return list(chosen[0].get("result") or []) if chosen else []


def _minimal_results(task: dict[str, Any]) -> list[Any]:
    """JSON-MIN: lists of values under the control's name, each with its own original size."""
    found = []
    for key, entries in task.items():
        for number, value in enumerate(entries if isinstance(entries, list) else ()):
            if not isinstance(value, dict) or "original_width" not in value:
                continue
            kind = next((kind for kind in _AREAS if f"{kind}labels" in value), None)
            kind = kind or ("brush" if "rle" in value else "polygon" if "points" in value else "rectangle")
            size = {side: value.get(side) for side in ("original_width", "original_height")}
            found.append({"id": f"{key} {number}", "type": f"{kind}labels", "value": value, **size})
    return found


def _add_result(result: dict[str, Any], regions: dict[str, dict[str, Any]], where: str, counted: Counted) -> None:
    """Add a result to its region: an area, a label, or sentences."""
    kind, value = str(result.get("type") or ""), result.get("value")
    if not isinstance(value, dict):
        return  # a relation between regions
    base = kind.removesuffix("labels")
    own = str(result.get("id") or where)
    if base not in _AREAS and kind not in ("textarea", "labels"):
        counted.add("results are neither areas nor texts of regions and were left out", f"{kind} in {where}")
        return
    region = regions.setdefault(own, {"id": own, "parts": [], "label": "", "texts": (), "size": None})
    labels = value.get(kind) or value.get("labels") or value.get(f"{base}labels")
    if isinstance(labels, list) and labels and base != "textarea":
        region["label"] = label_of(labels[0], where)
    if kind == "textarea":
        texts = value.get("text") or []
        texts = texts if isinstance(texts, list) else [texts]
        if not all(isinstance(text, str) for text in texts):
            raise UserError(f"{where}: the text is {str(texts)[:50]!r}, not a text or a list of texts")
        region["texts"] += tuple(text for text in map(clean_sentence, texts) if text)
        return
    meta = result.get("meta") or value.get("meta") or {}
    region["texts"] += sentences_of(meta if isinstance(meta, dict) else {}, where)
    if base in _AREAS:
        if result.get("image_rotation"):
            raise UserError(f"{where}: the picture was turned in Label Studio by {result['image_rotation']} degrees")
        region["size"] = stated_size(result.get("original_height"), result.get("original_width"), where)
        region["parts"].append(_part(base, value, region["size"], where))


def _part(kind: str, value: dict[str, Any], size: Size, where: str) -> Any:
    """A flat polygon in pixels, or run lengths."""
    height, width = size
    if kind == "brush":
        try:
            return encode_mask(brush_mask(value.get("rle"), height, width))
        except BrokenSegmentationError as error:
            raise UserError(f"{where}: {error}") from error
    if kind == "polygon":
        return _pixels(point_pairs(value.get("points"), where), size)
    turn = numbers([value.get("rotation") or 0], 1, "the rotation", where)[0]
    if kind == "rectangle":
        x, y, w, h = numbers([value.get(key) for key in ("x", "y", "width", "height")], 4, "the rectangle", where)
        corners = _pixels(rectangle(x, y, x + w, y + h), size)
        return turned(corners, (corners[0], corners[1]), turn)  # around its first corner
    x, y, rx, ry = numbers([value.get(key) for key in ("x", "y", "radiusX", "radiusY")], 4, "the ellipse", where)
    return ellipse(x * width / 100, y * height / 100, rx * width / 100, ry * height / 100, turn)


def _pixels(percent: list[float], size: Size) -> list[float]:
    return [number * size[1 - i % 2] / 100 for i, number in enumerate(percent)]


def _find(finder: PictureFinder, address: str, where: str) -> str:
    """The picture of an address: of an upload (`8 hex digits-NAME`), a local file (`?d=PATH`), a bucket or a path."""
    parts = urlsplit(address)
    local = parse_qs(parts.query).get("d", [None])[0]
    name = local or unquote(parts.path) or address
    base = name.rpartition("/")[2]
    hashed, _, original = base.partition("-")
    names = [name.lstrip("/"), base, *([original] if len(hashed) == 8 and original else [])]
    found = next((found for candidate in names if (found := finder.find(candidate)) is not None), None)
    return found if found is not None else find_picture(finder, base, where)
