"""The one form that every reader produces: refs, images and annotations of a data set, before images are read.

`image_jobs` groups them by image; `read_job` reads one image and makes its referents, on any process.
"""

import reprlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from amltrain.data.catalog import DatasetSpec
from amltrain.data.images import FileFault, ImageFile, read_image_file, read_mask_file
from amltrain.data.segmentation import BrokenSegmentationError, area, encode_mask, referent_mask
from amltrain.data.sources.cells import text_fault
from amltrain.data.sources.entries import referred_ids
from amltrain.data.sources.frame import (
    COCO_RULE,
    RESIZED,
    Frame,
    FrameRule,
    Size,
    establish,
    fit_bitmap,
    in_frame,
    scale_box,
    stated_by_mask,
    upright_content,
)
from amltrain.registry import READERS

LARGE_SHARE = 0.95
"""A mask that covers more of its image is counted and shown: it is often an inverted mask."""
LONGEST_SENTENCE = 10_000
"""Characters; a longer sentence is a fault of the file."""


class Skipped(NamedTuple):
    """A skipped entry of the files: its name, the reason, and its number of sentences."""

    what: str
    why: str
    expressions: int


class MaskFile(NamedTuple):
    """A segmentation in a separate file. value, threshold: see `read_mask_file`."""

    root: Path
    name: str
    value: int | None = None
    threshold: int | None = None


class Annotations(NamedTuple):
    """The parsed files of one data set: refs in file order, the rest by id.

    refs: as in REFER, see `check_refs`; an optional `place` names the ref in messages ("row 3"). images: file_name,
    height, width; the last two may be None, the image's own size then counts. annotations: segmentation (polygons,
    RLE, or a MaskFile), bbox, category_id, iscrowd. sources: what was read and its SHA-256, by file name. place: where
    the annotations came from, for messages. notes: what a person should know of how the files were read. rule: what
    decides a picture's frame where sizes do not. links: pictures and masks may be links that leave their folder.
    """

    name: str
    spec: DatasetSpec
    refs: list[dict[str, Any]]
    images: dict[int, dict[str, Any]]
    annotations: dict[int, dict[str, Any]]
    categories: dict[int, str]
    sources: dict[str, str]
    place: str
    notes: tuple[str, ...] = ()
    rule: FrameRule = COCO_RULE
    links: bool = False

    @property
    def expressions(self) -> int:
        """Number of sentences in all refs."""
        return sum(len(ref["sentences"]) for ref in self.refs)


Reader = TypeVar("Reader", bound=Callable[[Path, str], Annotations])


def register_reader(layout: str) -> Callable[[Reader], Reader]:
    """Register a function `read(root, data set) -> Annotations` as the reader of a layout (`DatasetSpec.layout`)."""

    def register(read: Reader) -> Reader:
        READERS.add(layout, read)
        return read

    return register


class ImageJob(NamedTuple):
    """Everything that one image's row is made of. image: its entry, None if the files do not list it. place: name of
    the annotations' file or folder, for messages that are published with the data. rule, links: see `Annotations`.
    """

    image_id: int
    image: dict[str, Any] | None
    refs: list[dict[str, Any]]
    annotations: dict[int, dict[str, Any]]
    place: str
    rule: FrameRule = COCO_RULE
    links: bool = False


class ImageGroup(NamedTuple):
    """An image and its usable referents, in the prepared schema. content: the file's bytes; None if nothing is usable.

    skipped: what could not be used. noticed: (kind, example) of what a person should look at.
    """

    image_id: int
    file_name: str
    height: int
    width: int
    referents: list[dict[str, Any]]
    content: bytes | None
    skipped: list[Skipped]
    noticed: list[tuple[str, str]]


def image_jobs(files: Annotations, split: str) -> Iterator[ImageJob]:
    """The split's images in the order in which the refs first name them, each with its refs."""
    by_image: dict[int, list[dict[str, Any]]] = {}
    for ref in files.refs:
        if files.spec.has(ref["split"], split):
            by_image.setdefault(ref["image_id"], []).append(ref)
    for image_id, refs in by_image.items():
        ids = {ann_id for ref in refs for ann_id in referred_ids(ref)}
        named = {ann_id: files.annotations[ann_id] for ann_id in ids if ann_id in files.annotations}
        yield ImageJob(
            image_id, files.images.get(image_id), refs, named, Path(files.place).name, files.rule, files.links
        )


def read_job(job: ImageJob, image_root: Path, categories: dict[int, str]) -> ImageGroup:
    """Read and decode the image, make every referent's mask, and count what cannot be used."""
    lost = sum(len(ref["sentences"]) for ref in job.refs)
    if job.image is None:
        skipped = [Skipped(f"image {job.image_id}", f"{job.place} does not list it", lost)]
        return ImageGroup(job.image_id, "", 0, 0, [], None, skipped, [])
    name = job.image["file_name"]
    try:
        file = read_image_file(image_root, name, job.links)
        frame = _frame(job, file)
    except FileFault as fault:
        skipped = [Skipped(f"image {_shown(name)} with {len(job.refs)} refs", str(fault), lost)]
        return ImageGroup(job.image_id, name, 0, 0, [], None, skipped, [])
    return job_group(job, file, categories, frame)


def read_jobs(jobs: Sequence[ImageJob], image_root: Path, categories: dict[int, str]) -> list[ImageGroup]:
    """`read_job` for several jobs; here, so that a further process imports little."""
    return [read_job(job, image_root, categories) for job in jobs]


def job_group(job: ImageJob, file: ImageFile, categories: dict[int, str], frame: Frame | None = None) -> ImageGroup:
    """The group of a job whose image was read: every referent's mask, and what cannot be used. frame: None = stored."""
    assert job.image is not None
    name = job.image["file_name"]
    frame = frame or Frame(file.height, file.width)
    height, width = frame.height, frame.width
    noticed = [(kind, name) for kind in frame.noticed]
    referents: list[dict[str, Any]] = []
    skipped: list[Skipped] = []
    for ref in job.refs:
        found, reasons = _referents(ref, job, frame, categories, noticed)
        referents += found
        skipped += reasons
    noticed += _notice(name, referents, height, width)
    content = (upright_content(file.content) if frame.rewrite else file.content) if referents else None
    return ImageGroup(job.image_id, name, height, width, referents, content, skipped, noticed)


def _frame(job: ImageJob, file: ImageFile) -> Frame:
    """The frame of a job's picture. Raises FileFault."""
    assert job.image is not None
    stored = (file.height, file.width)
    height, width = job.image.get("height"), job.image.get("width")
    stated = None if height is None or width is None else (height, width)
    if file.turn == 1 and (stated is None or stated == stored):
        return Frame(*stored)
    if stated is None and job.rule.exif == "auto":
        stated = next(
            filter(None, (_size_of_mask(a["segmentation"], job.links) for a in job.annotations.values())), None
        )
    return establish(stored, file.turn, stated, job.rule)


def _size_of_mask(segmentation: Any, links: bool) -> Size | None:
    """Height and width that a mask states, a mask file's too."""
    if not isinstance(segmentation, MaskFile):
        return stated_by_mask(segmentation)
    image = read_image_file(segmentation.root, segmentation.name, links)
    return (image.height, image.width)


def _referents(
    ref: dict[str, Any],
    job: ImageJob,
    frame: Frame,
    categories: dict[int, str],
    noticed: list[tuple[str, str]],
) -> tuple[list[dict[str, Any]], list[Skipped]]:
    """The referent of a ref; two where some of its sentences refer to nothing in the image (R-RefCOCO)."""
    size = (frame.height, frame.width)
    name = f"{ref.get('place') or 'ref ' + str(ref['ref_id'])} of image {ref.get('image_name') or ref['image_id']}"
    real, absent, skipped = _sentences(ref, name)
    if not real and not absent:
        return [], [*skipped, Skipped(name, "it has no sentence", 0)]
    referents = []
    if real:
        ann_ids = referred_ids(ref)
        try:
            annotations = _annotations(ann_ids, job)
            masks = referent_mask([_segmentation(a, frame, job.links, name, noticed) for a in annotations], *size)
        except FileFault as fault:
            skipped.append(Skipped(name, str(fault), len(real)))
        except BrokenSegmentationError as error:
            skipped.append(Skipped(name, f"broken segmentation: {error}", len(real)))
        else:
            skipped += [Skipped(f"a polygon of {name}", why, 0) for why in masks.dropped]
            named = dict.fromkeys(categories.get(a["category_id"], "?") for a in annotations)
            box = _joint_box([scale_box(a["bbox"], frame.scale) for a in annotations])
            referents.append(_row(ref, ann_ids, ", ".join(named), box, (masks.union, masks.exclusive), real))
    if absent:
        referents.append(_row(ref, [], "", [], (referent_mask([], *size).union, None), absent))
    return referents, skipped


def _row(
    ref: dict[str, Any], ann_ids: list[int], category: str, box: list[float], masks: tuple[Any, Any], sentences: Any
) -> dict[str, Any]:
    return {
        "ref_id": ref["ref_id"],
        "ann_ids": ann_ids,
        "category": category,
        "bbox": box,
        "no_target": not ann_ids,
        "mask": masks[0],
        "mask_exclusive": masks[1],
        "sentences": sentences,
    }


def _sentences(ref: dict[str, Any], name: str) -> tuple[list[dict[str, Any]], list[dict[str, Any]], list[Skipped]]:
    """Sentences about something in the image, sentences about nothing in it, and the unusable ones."""
    real: list[dict[str, Any]] = []
    absent: list[dict[str, Any]] = []
    skipped = []
    no_target = not referred_ids(ref)
    for sentence in ref["sentences"]:
        sent = str(sentence.get("sent") or "").strip()
        raw = str(sentence.get("raw") or sent).strip()
        fault = _text_fault(sent, raw)
        if fault:
            skipped.append(Skipped(f"sentence {sentence['sent_id']} of {name}", fault, 1))
            continue
        entry = {"sent_id": sentence["sent_id"], "sent": sent or raw.lower(), "raw": raw or sent}
        (absent if no_target or not sentence.get("exist", True) else real).append(entry)
    return real, absent, skipped


def _text_fault(sent: str, raw: str) -> str | None:
    if not sent and not raw:
        return "it is empty"
    if len(sent) > LONGEST_SENTENCE or len(raw) > LONGEST_SENTENCE:
        return f"it has more than {LONGEST_SENTENCE:,} characters"
    return text_fault(sent + raw)


def _annotations(ann_ids: list[int], job: ImageJob) -> list[dict[str, Any]]:
    """The named annotations; among several, crowds are left out (gRefCOCO's rule)."""
    missing = [ann_id for ann_id in ann_ids if ann_id not in job.annotations]
    if missing:
        raise BrokenSegmentationError(f"{job.place} has no annotation {missing[0]}")
    annotations = [job.annotations[ann_id] for ann_id in ann_ids]
    foreign = [a for a in annotations if a.get("image_id", job.image_id) != job.image_id]
    if foreign:
        raise BrokenSegmentationError(
            f"annotation {foreign[0]['id']} is of image {reprlib.repr(foreign[0]['image_id'])}"
        )
    kept = [a for a in annotations if len(annotations) == 1 or not a.get("iscrowd", 0)]
    if not kept:
        raise BrokenSegmentationError("all its annotations are crowds")
    return kept


def _segmentation(
    annotation: dict[str, Any], frame: Frame, links: bool, place: str, noticed: list[tuple[str, str]]
) -> Any:
    """Return the input of `referent_mask`: a mask of any form in the frame's pixels, a mask file read."""
    segmentation = annotation["segmentation"]
    if not isinstance(segmentation, MaskFile):
        fitted, kinds = in_frame(segmentation, frame)
        noticed += [(kind, place) for kind in kinds]
        return fitted
    root, name, value, threshold = segmentation
    try:
        mask = read_mask_file(root, name, value, threshold, links)
        fitted_mask = fit_bitmap(mask, frame)
        if fitted_mask is not mask:
            noticed.append((RESIZED, place))
        return encode_mask(fitted_mask)
    except BrokenSegmentationError as error:
        raise FileFault(f"mask {_shown(name)}: {error}") from error
    except FileFault as fault:
        raise FileFault(f"mask {_shown(name)}: {fault}") from fault


def _shown(name: str) -> str:
    """A path for messages that are published with the data: an absolute one without its folders."""
    return Path(name).name if Path(name).is_absolute() else name


def _joint_box(boxes: list[list[float]]) -> list[float]:
    boxes = [box for box in boxes if box]
    if not boxes:
        return []
    left, top = min(x for x, _, _, _ in boxes), min(y for _, y, _, _ in boxes)
    right, bottom = max(x + w for x, _, w, _ in boxes), max(y + h for _, y, _, h in boxes)
    return [left, top, right - left, bottom - top]


def _notice(image: str, referents: list[dict[str, Any]], height: int, width: int) -> list[tuple[str, str]]:
    """Count values that are legal but often a mistake."""
    noticed = []
    pairs = Counter[tuple[str, str]]()
    for referent in referents:
        texts = [sentence["raw"] for sentence in referent["sentences"]]
        folded = [text.casefold() for text in texts]
        if len(set(folded)) < len(set(texts)):
            noticed.append(("referents with sentences that differ only in case", f"ref {referent['ref_id']}"))
        pairs.update((text, referent["mask"]["counts"]) for text in dict.fromkeys(folded))
        if len(set(texts)) < len(texts):
            noticed.append(("referents with the same sentence twice", f"ref {referent['ref_id']}"))
        if not referent["no_target"] and area(referent["mask"]) > LARGE_SHARE * height * width:
            what = f"masks cover more than {LARGE_SHARE:.0%} of the image; are they inverted?"
            noticed.append((what, f"ref {referent['ref_id']} of {image}"))
        if (box := referent["bbox"]) and (box[0] + box[2] > width + 1 or box[1] + box[3] > height + 1):
            what = "boxes reach beyond their image; are they x1, y1, x2, y2 instead of x, y, width, height?"
            noticed.append((what, f"ref {referent['ref_id']} of {image}"))
    noticed += [
        ("pairs of the same sentence and mask occur again in other refs", f"{text[0][:60]!r} in {image}")
        for text, count in pairs.items()
        if count > 1
    ]
    return noticed
