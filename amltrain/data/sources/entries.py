"""Check the entries of annotation files: refs, sentences, images, annotations and categories, by their keys' values."""

import reprlib
from collections.abc import Callable, Sequence
from collections.abc import Set as AbstractSet
from math import isfinite
from typing import Any

from amltrain.data.catalog import SPECIAL_KEYS, DatasetSpec
from amltrain.errors import UserError

_IDS = 2**63
_LARGEST_SIDE = 2**20
_OF_A_REF = ("ref_id", "image_id", "ann_id", "split", "sentences")
_OF_A_SENTENCE = ("sent_id",)


def referred_ids(ref: dict[str, Any]) -> list[int]:
    """The annotations of a ref; none where it refers to nothing."""
    if ref.get("source") == "zero":
        return []
    ann_ids = ref["ann_id"] if isinstance(ref["ann_id"], list) else [ref["ann_id"]]
    return [] if ann_ids == [-1] else ann_ids


def by_id(
    entries: Sequence[Any], kind: str, keys: Sequence[str], place: str, used: AbstractSet[int] | None = None
) -> dict[int, dict[str, Any]]:
    """Return entries by their `id`.

    used: ids that refs name; None = all. Others are left out unchecked: an unused bad row stops nothing. Raises
    UserError for a missing key or an unusable value, and for two different entries of one id.
    """
    needed = ("id", *keys)
    found: dict[int, dict[str, Any]] = {}
    for number, entry in enumerate(entries):
        if used is not None and (not isinstance(entry, dict) or not _names_one_of(entry.get("id"), used)):
            continue
        stated = ("image_id",) if isinstance(entry, dict) and entry.get("image_id") is not None else ()
        check_entry(entry, (*needed, *stated), f"{kind} number {number}", place)
        other = found.setdefault(entry["id"], entry)
        if other is not entry and any(other[key] != entry[key] for key in keys):
            raise UserError(
                f"{place}: {kind} number {number} has the id {entry['id']}, which another {kind} with other values "
                f"has; give each its own id"
            )
    return found


def _names_one_of(value: Any, used: AbstractSet[int]) -> bool:
    """Whether an id is, or was meant to be, one that refs name: 7.0 and "7" are checked, and named, too."""
    try:
        return value in used or (isinstance(value, str) and value.strip().lstrip("-").isdigit() and int(value) in used)
    except TypeError:  # a list
        return False


def check_refs(refs: Sequence[Any], spec: DatasetSpec, name: str, place: str) -> None:
    """Raise UserError for refs that cannot be used or whose meaning is not understood, naming the ref.

    A ref needs ref_id, image_id, ann_id (a number, or a list with [-1] = nothing), split and sentences; a sentence
    needs sent_id. Keys of SPECIAL_KEYS must be among those that the data set uses, and splits among its splits.
    """
    known = {split: any(spec.has(split, own) for own in spec.splits) for split in spec.splits}
    foreign = [key for key in SPECIAL_KEYS if key not in spec.special_keys]
    for number, ref in enumerate(refs):
        what = f"ref number {number}"
        check_entry(ref, _OF_A_REF, what, place)
        split = ref["split"]
        if split not in known:
            known[split] = any(spec.has(split, own) for own in spec.splits)
        if not known[split]:
            raise UserError(
                f"{place}: {what} has split {reprlib.repr(split)}, and {name} has {', '.join(spec.splits)}; correct "
                f"the file, or choose the data set that the file belongs to"
            )
        _check_meaning(ref, foreign, what, name, place)
        of_ref = f"a sentence of ref {ref['ref_id']}"
        for sentence in ref["sentences"]:
            check_entry(sentence, _OF_A_SENTENCE, of_ref, place)
            _check_texts(sentence, of_ref, place)
            _check_meaning(sentence, foreign, of_ref, name, place)
        if not (referred_ids(ref) or spec.generalised or spec.special_keys) and ref["ann_id"] != []:
            raise UserError(f"{place}: {what} has ann_id -1, it refers to nothing, which {name} has no refs for")
        if ref["ann_id"] == [] and ref.get("source") != "zero":
            raise UserError(f"{place}: {what} has an empty ann_id; write [-1] where the sentence refers to nothing")
        if ref.get("no_target") is not None and bool(ref["no_target"]) != (not referred_ids(ref)):
            given, ids = reprlib.repr(ref["no_target"]), reprlib.repr(ref["ann_id"])
            raise UserError(f"{place}: {what} has no_target {given}, but ann_id {ids}")
    if not any(ref["sentences"] for ref in refs):
        raise UserError(f"{place} holds no sentence at all; download the file again")


def _check_meaning(entry: dict[str, Any], foreign: Sequence[str], what: str, name: str, place: str) -> None:
    for key in foreign:
        if key in entry:
            raise UserError(
                f"{place}: {what} has {key!r} {reprlib.repr(entry[key])}, which changes its meaning and is not part of "
                f"{name}; choose the data set that the file belongs to, such as r-refcoco, ref-zom or grefcoco"
            )
    if entry.get("exist", True) not in (0, 1):
        raise UserError(f"{place}: {what} has 'exist' {reprlib.repr(entry['exist'])}, not true or false")


def _check_texts(sentence: dict[str, Any], what: str, place: str) -> None:
    for key in ("sent", "raw"):
        if sentence.get(key) is not None and not isinstance(sentence[key], str):
            given = reprlib.repr(sentence[key])
            raise UserError(f"{place}: {what} has {key!r} {given}, not a text; correct the file")


def check_entry(entry: Any, keys: Sequence[str], what: str, place: str) -> None:
    """Raise UserError unless the entry has the keys, with values that can be used."""
    if not isinstance(entry, dict):
        raise UserError(f"{place}: {what} has no {keys[0]!r}; download the file again")
    for key in keys:
        if key not in entry:
            raise UserError(f"{place}: {what} has no {key!r}; download the file again")
        if key in _VALUES:
            fits, wanted = _VALUES[key]
            if not fits(entry[key]):
                given = reprlib.repr(entry[key])
                raise UserError(f"{place}: {what} has {key!r} {given}, not {wanted}; correct the file")


def _is_id(value: Any) -> bool:
    return type(value) is int and -_IDS <= value < _IDS  # True is an int, too


def _is_side(value: Any) -> bool:
    return _is_id(value) and 0 < value <= _LARGEST_SIDE


def _is_ann_id(value: Any) -> bool:
    return _is_id(value) or (isinstance(value, list) and all(map(_is_id, value)))


def _is_box(value: Any) -> bool:
    if not isinstance(value, (list, tuple)) or len(value) != 4:
        return False
    left, top, width, height = value
    try:
        return isfinite(left) and isfinite(top) and isfinite(width) and isfinite(height)
    except (TypeError, OverflowError):
        return False


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_written(value: Any) -> bool:
    """Whether it is a text that a file can hold: no half of a surrogate pair."""
    try:
        return isinstance(value, str) and bool(value.encode() or True)
    except UnicodeEncodeError:
        return False


_VALUES: dict[str, tuple[Callable[[Any], bool], str]] = {
    **dict.fromkeys(("id", "ref_id", "sent_id", "image_id", "category_id"), (_is_id, "a whole number of 64 bits")),
    **dict.fromkeys(("height", "width"), (_is_side, f"a whole number from 1 to {_LARGEST_SIDE}")),
    **dict.fromkeys(("split", "file_name"), (_is_text, "a text")),
    "name": (_is_written, "a text"),
    "ann_id": (_is_ann_id, "a whole number or a list of them"),
    "bbox": (_is_box, "four numbers"),
    "sentences": (lambda value: isinstance(value, list), "a list"),
}
"""The values that an entry may have, and their description. A segmentation is checked where it is read."""
