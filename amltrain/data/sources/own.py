"""Rows of image, sentences and mask -> `Annotations`: the way of every data set that is not in the REFER layout."""

import hashlib
import json
import re
import reprlib
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from amltrain.data.catalog import DatasetSpec
from amltrain.data.sources.annotations import Annotations, MaskFile
from amltrain.data.sources.cells import split_name
from amltrain.data.sources.frame import SIZES_DECIDE, FrameRule
from amltrain.data.sources.pictures import PictureFinder, same_pictures
from amltrain.errors import UserError
from amltrain.registry import DATASETS

SHARES = {"train": 0.8, "val": 0.1, "test": 0.1}
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,63}")
_SPLIT = re.compile(r"[A-Za-z0-9][A-Za-z0-9_]{0,31}")
_COCO_NAME = re.compile(r"COCO_(?:train|val)2014_(\d{12})(?:_\d+)?\.jpg")
_RESERVED = {"combined", "combined-unfiltered", "source"}


class TableRow(NamedTuple):
    """One object of one image. place: names the row in messages. image: path below the image folder.

    segmentation: a mask of any form of `mask_forms`, or a MaskFile; None = the sentences refer to nothing in the image.
    box: x, y, width, height in pixels, or empty. split: None = assigned by hash. size: height and width, where
    the annotations state them. crowd: several objects of the class in one annotation, not to be told apart.
    """

    place: str
    image: str
    sentences: tuple[str, ...]
    segmentation: Any
    split: str | None = None
    ref_id: int | None = None
    image_id: int | None = None
    category: str = ""
    box: tuple[float, ...] = ()
    size: tuple[int, int] | None = None
    crowd: bool = False


def check_name(name: str) -> None:
    """Raise UserError for a name that own data cannot have."""
    if name in DATASETS or name in _RESERVED:
        raise UserError(f"{name!r} is the name of a published data set or of a group; choose another --name")
    if not _NAME.fullmatch(name):
        raise UserError(f"--name {name!r} should be letters, digits and . _ + - only, 64 at most")


def name_of(path: Path) -> str:
    """A name for the data set at a path: its file's or folder's, in the letters that a name may have."""
    whole = path.resolve()
    plain = re.sub(r"[^A-Za-z0-9._+-]+", "-", whole.stem if whole.is_file() else whole.name).strip("-._+")[:60]
    return f"my-{plain}" if plain in DATASETS or plain in _RESERVED else plain or "mine"


def build_annotations(
    rows: Iterable[TableRow],
    name: str,
    *,
    sources: dict[str, str],
    place: str,
    spec: DatasetSpec | None = None,
    seed: int = 0,
    shares: Mapping[str, float] = SHARES,
    notes: tuple[str, ...] = (),
    rule: FrameRule = SIZES_DECIDE,
    links: bool = False,
    pictures: Path | None = None,
) -> Annotations:
    """Group rows into refs. Rows of one image with the same ref_id, or the same mask, are one ref with all sentences.

    spec: of a published data set; None = own data, whose splits are those of the rows, or `shares` of the images by a
    hash of their names and `seed`. rule, links: see `Annotations`. pictures: the folder of own data's pictures, in
    which names that are spelled otherwise are found and names of one picture are joined. Raises UserError naming the
    row.
    """
    twins: dict[str, str] = {}
    if pictures is not None:
        rows, twins, found_notes = _one_name_each(list(rows), pictures)
        notes = (*notes, *found_notes)
    refs: dict[tuple[str, str], dict[str, Any]] = {}
    images: dict[int, dict[str, Any]] = {}
    annotations: dict[int, dict[str, Any]] = {}
    categories: dict[str, int] = {}
    ids: dict[str, int] = {}
    sent_id = 0
    for number, row in enumerate(rows):
        image_id = _image_id(row, ids, images, place)
        key = _ref_key(row)
        ref = refs.get((row.image, key))
        if ref is None:
            ref = refs[row.image, key] = _new_ref(row, number, image_id)
            if row.segmentation is not None:
                category = categories.setdefault(row.category, len(categories) + 1)
                annotations[number] = {
                    "id": number,
                    "image_id": image_id,
                    "segmentation": row.segmentation,
                    "bbox": list(row.box),
                    "category_id": category,
                }
        else:
            _check_same_ref(row, ref, place)
        for sentence in row.sentences:
            ref["sentences"].append({"sent_id": sent_id, "sent": sentence.lower(), "raw": sentence})
            sent_id += 1
    if not sent_id:
        raise UserError(f"{place} holds no sentence at all")
    found = list(refs.values())
    if spec is None:
        spec, more = _own_spec(name, found, seed, shares, place, twins)
        notes = (*notes, *more)
    return Annotations(
        name,
        spec,
        found,
        images,
        annotations,
        {number: category for category, number in categories.items()},
        sources,
        place,
        notes,
        rule,
        links,
    )


def _one_name_each(rows: list[TableRow], pictures: Path) -> tuple[list[TableRow], dict[str, str], tuple[str, ...]]:
    """Rows with one name for each picture and one for each split, copies of a picture by name, and what to note."""
    finder = PictureFinder(pictures)
    names = {name: finder.find(name) or name for name in dict.fromkeys(row.image for row in rows)}
    same_file, copies = same_pictures(pictures, names.values())
    names = {name: same_file.get(found, found) for name, found in names.items()}
    splits = {split: split_name(split) for split in dict.fromkeys(row.split for row in rows)}
    notes = []
    respelled = [name for name, found in names.items() if name != found]
    if respelled:
        example = f"{respelled[0][:100]!r} is {names[respelled[0]]!r}"
        notes.append(f"{len(respelled)} picture names were read as those of the files (e.g. {example})")
    if listed := ", ".join(f"{given!r} as {split}" for given, split in splits.items() if given != split):
        notes.append(f"splits were read in one spelling: {listed[:200]}")
    return [row._replace(image=names[row.image], split=splits[row.split]) for row in rows], copies, tuple(notes)


def _new_ref(row: TableRow, number: int, image_id: int) -> dict[str, Any]:
    """Start a ref without sentences from its first row, the `number`-th of the table."""
    ref: dict[str, Any] = {
        "ref_id": number if row.ref_id is None else row.ref_id,
        "image_id": image_id,
        "image_name": row.image,
        "ann_id": -1 if row.segmentation is None else number,
        "split": row.split,
        "place": row.place,
        "sentences": [],
    }
    return ref if row.ref_id is None else {**ref, "mask_key": _mask_key(row.segmentation)}


def _check_same_ref(row: TableRow, ref: dict[str, Any], place: str) -> None:
    """Raise UserError for a further row of a ref that names another split or mask."""
    if ref["split"] != row.split:
        one, other = (reprlib.repr(split) for split in (row.split, ref["split"]))
        raise UserError(f"{place}, {row.place}: ref {ref['ref_id']} is in split {one} and {other}")
    if row.ref_id is not None and _mask_key(row.segmentation) != ref["mask_key"]:
        raise UserError(f"{place}, {row.place}: ref {row.ref_id} of image {row.image} has two masks; give it two ids")


def _ref_key(row: TableRow) -> str:
    if row.ref_id is not None:
        return f"id {row.ref_id}"
    return _mask_key(row.segmentation)


def _mask_key(segmentation: Any) -> str:
    if segmentation is None:
        return "none"
    if isinstance(segmentation, MaskFile):
        return f"file {segmentation.name} {segmentation.value}"
    return hashlib.sha256(json.dumps(segmentation, sort_keys=True, default=str).encode()).hexdigest()


def _image_id(row: TableRow, ids: dict[str, int], images: dict[int, dict[str, Any]], place: str) -> int:
    """The image's own id, COCO's number from its name, or a hash of its name, which meets no COCO id."""
    if row.image not in ids:
        coco = _COCO_NAME.fullmatch(row.image.rpartition("/")[2])
        hashed = int.from_bytes(hashlib.sha256(row.image.encode(errors="replace")).digest()[:7], "big") | 2**40
        image_id = row.image_id if row.image_id is not None else int(coco[1]) if coco else hashed
        if image_id in images:
            raise UserError(
                f"{place}, {row.place}: image id {image_id} is also that of {images[image_id]['file_name']}"
            )
        ids[row.image] = image_id
        height, width = row.size or (None, None)
        images[image_id] = {"id": image_id, "file_name": row.image, "height": height, "width": width}
    return ids[row.image]


def _own_spec(
    name: str, refs: list[dict[str, Any]], seed: int, shares: Mapping[str, float], place: str, twins: Mapping[str, str]
) -> tuple[DatasetSpec, list[str]]:
    """The spec of own data; refs without a split get one. twins: names of pictures with the bytes of another one."""
    given = [ref for ref in refs if ref["split"] is not None]
    notes = []
    if given and len(given) < len(refs):
        missing = next(ref for ref in refs if ref["split"] is None)
        raise UserError(f"{place}, {missing['place']}: no split, but other rows have one; fill the column or drop it")
    if given:
        splits = tuple(dict.fromkeys(ref["split"] for ref in refs))
        bad = next((split for split in splits if not _SPLIT.fullmatch(split)), None)
        if bad is not None:
            raise UserError(f"{place}: the split {bad[:50]!r} should be letters, digits and _ only")
        by_image: dict[str, set[str]] = {}
        for ref in refs:
            image = ref["image_name"]
            by_image.setdefault(twins.get(image, image), set()).add(ref["split"])
        shared = [image for image, found in by_image.items() if len(found) > 1]
        if shared:
            copied = ", copies under other names included" if twins else ""
            notes.append(f"{len(shared)} images are in more than one split{copied} (e.g. {shared[0]})")
        splits = tuple(sorted(splits, key=lambda split: (split != "train", split != "val")))
    else:
        _check_shares(shares)
        originals = {ref["image_name"]: twins.get(ref["image_name"], ref["image_name"]) for ref in refs}
        split_of = assign_splits(dict.fromkeys(originals.values()), seed, shares)
        for ref in refs:
            ref["split"] = split_of[originals[ref["image_name"]]]
        splits = tuple(split for split in shares if split in split_of.values())
        notes += _splits_noted(split_of, seed, shares)
    generalised = any(ref["ann_id"] == -1 for ref in refs)
    return DatasetSpec(name, "own", splits, generalised=generalised, layout="table", exact_splits=True), notes


def _splits_noted(split_of: Mapping[str, str], seed: int, shares: Mapping[str, float]) -> list[str]:
    """What to tell about splits that were drawn; with few images also how to choose them."""
    listed = ", ".join(f"{split} {share:g}" for split, share in shares.items())
    notes = [f"splits were drawn by a hash of the image names and seed {seed} ({listed})"]
    if len(split_of) * min(shares.values()) < 1:
        largest = max(shares, key=lambda split: shares[split])
        used = list(split_of.values()).count(largest)
        notes.append(
            f"there are few images ({len(split_of)}), {used} of them in {largest}; to choose yourself, give a table a "
            f"column `split`, and other forms folders named train and val"
        )
    return notes


def _check_shares(shares: Mapping[str, float]) -> None:
    if not shares or min(shares.values()) <= 0 or abs(sum(shares.values()) - 1) > 1e-6:
        raise UserError(f"--split_shares {dict(shares)} should be above 0 and add up to 1")
    bad = next((split for split in shares if not _SPLIT.fullmatch(split)), None)
    if bad is not None:
        raise UserError(f"--split_shares: the split {bad[:50]!r} should be letters, digits and _ only")


def assign_splits(images: Iterable[str], seed: int, shares: Mapping[str, float]) -> dict[str, str]:
    """A split for every image, by a hash of its name and the seed: further images change nobody else's split.

    A split that stays empty takes an image of the fullest one, as long as that has two. With fewer images than splits,
    those of the largest shares get one: an image alone is in train.
    """
    place = {
        image: int.from_bytes(hashlib.sha256(f"{seed} {image}".encode(errors="replace")).digest()[:8], "big") / 2**64
        for image in images
    }
    splits = list(shares)
    found = {}
    for image, value in place.items():
        total = 0.0
        for split in splits:
            total += shares[split]
            if value < total or split == splits[-1]:
                found[image] = split
                break
    order = sorted(splits, key=lambda split: -shares[split])
    for number, split in enumerate(order):
        sizes = Counter(found.values())
        givers = [other for other in order if sizes[other] > (other in order[:number])]
        if not sizes[split] and givers:
            fullest = max(givers, key=lambda other: sizes[other])
            found[max((i for i, s in found.items() if s == fullest), key=lambda image: place[image])] = split
    return found
