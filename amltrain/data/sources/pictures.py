"""Find pictures under the names that annotations give them, and tell which names mean the same picture."""

import hashlib
import os
import re
import unicodedata
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from urllib.parse import unquote, urlsplit

from amltrain.data.images import MAX_FILE_BYTES

ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
"""Endings of pictures, in lower case; files may have them in capitals."""
_COCO_2014 = re.compile(r"COCO_(?:train|val)2014_(\d{12})(?:_\d+)?\.jpg")


def tidy_name(name: str) -> str:
    """A path in one spelling: forward slashes, no `./`, no doubled slash, no `file://`."""
    name = name.strip()
    if name.startswith("file://"):
        name = unquote(urlsplit(name).path)
    name = name.replace("\\", "/")
    absolute = name.startswith("/")
    parts = [part for part in name.split("/") if part not in ("", ".")]
    return ("/" if absolute else "") + "/".join(parts)


def is_picture(path: Path) -> bool:
    """Whether a file's name ends like a picture's, in small letters or capitals."""
    return path.suffix.lower() in ENDINGS


class PictureFinder:
    """Finds files below a folder under other spellings of their names; remembers what it found.

    Exact names are asked of the disk one by one. Only when one fails is the folder listed, once.
    """

    def __init__(self, root: Path, *, by_base_name: bool = False) -> None:
        """by_base_name: tools write paths of another machine; a file's last part is enough where it is unique."""
        self.root, self._by_base_name = root, by_base_name
        self.respelled: dict[str, str] = {}
        self._found: dict[str, str | None] = {}

    def find(self, name: str) -> str | None:
        """The path below the root of the file that `name` means; None where there is none or several may be meant."""
        if name not in self._found:
            found = self._look_up(name)
            self._found[name] = found
            if found is not None and found != name:
                self.respelled[name] = found
        return self._found[name]

    def _look_up(self, name: str) -> str | None:
        tidy = tidy_name(name)
        inside = os.path.relpath(tidy, self.root.absolute()) if tidy.startswith("/") else os.path.normpath(tidy)
        inside = inside.replace(os.sep, "/")
        if ".." not in inside.split("/") and _is_file(self.root / inside):
            return inside
        if "\\" in name and ".." not in name and not os.path.isabs(name) and _is_file(self.root / name):
            return name  # here a back slash is part of the name
        for key, table in ((_folded(inside), self._paths), (_folded(tidy.rpartition("/")[2]), self._bases)):
            if table is self._bases and not self._by_base_name:
                break
            matches = table.get(key, [])
            if len(matches) == 1:
                return matches[0]
        coco = _COCO_2014.fullmatch(tidy.rpartition("/")[2])
        matches = self._bases.get(f"{coco[1]}.jpg", []) if coco else []
        return matches[0] if len(matches) == 1 else None

    @cached_property
    def _paths(self) -> dict[str, list[str]]:
        """Every file below the root by its folded path."""
        table: dict[str, list[str]] = {}
        for folder, _, files in os.walk(self.root):
            start = os.path.relpath(folder, self.root).replace(os.sep, "/")
            for file in files:
                path = file if start == "." else f"{start}/{file}"
                table.setdefault(_folded(path), []).append(path)
        return table

    @cached_property
    def _bases(self) -> dict[str, list[str]]:
        table: dict[str, list[str]] = {}
        for paths in self._paths.values():
            for path in paths:
                table.setdefault(_folded(path.rpartition("/")[2]), []).append(path)
        return table


def _is_file(path: Path) -> bool:
    try:
        return os.path.isfile(path)
    except ValueError:  # a NUL in the name
        return False


def _folded(name: str) -> str:
    """A name in which composed and decomposed letters, capitals and small letters are equal."""
    return unicodedata.normalize("NFC", name).casefold()


def same_pictures(root: Path, names: Iterable[str]) -> tuple[dict[str, str], dict[str, str]]:
    """Names of one file (links), and names of files with the same bytes, each -> the first name of that picture.

    Only names that are not the first are in the results. Bytes are read only where two files are equally long.
    """
    first_of_file: dict[tuple[int, int], str] = {}
    same: dict[str, str] = {}
    copies: dict[str, str] = {}
    by_length: dict[int, list[str]] = {}
    for name in dict.fromkeys(names):
        try:
            status = os.stat(root / name)
        except (OSError, ValueError):
            continue  # named where it is read
        key = (status.st_dev, status.st_ino)
        if key in first_of_file:
            same[name] = first_of_file[key]
            continue
        first_of_file[key] = name
        if status.st_size <= MAX_FILE_BYTES:
            by_length.setdefault(status.st_size, []).append(name)
    for alike in by_length.values():
        if len(alike) < 2:
            continue
        first_of_bytes: dict[bytes, str] = {}
        for name in alike:
            digest = _digest(root / name)
            if digest is not None and first_of_bytes.setdefault(digest, name) != name:
                copies[name] = first_of_bytes[digest]
    return same, copies


def _digest(path: Path) -> bytes | None:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").digest()
    except OSError:
        return None
