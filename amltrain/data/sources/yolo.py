"""YOLO segmentation and detection: data.yaml, and for every picture a text file of normalised outlines.

    data.yaml                      names (list or mapping), train, val, test (folders, or text files that list pictures)
    images/train/X.jpg             labels/train/X.txt, or train/images/X.jpg and train/labels/X.txt (Roboflow)

A line: class number, then x y of every corner (at least three), or centre x, centre y, width, height. Numbers are
shares of the upright picture's sides, as ultralytics reads pictures. The format has no sentences.
"""

from pathlib import Path
from typing import Any

import yaml
from PIL import Image

from amltrain.data.images import exif_turn
from amltrain.data.sources.cells import read_text, split_name, text_lines
from amltrain.data.sources.frame import FrameRule, Size, upright_size
from amltrain.data.sources.objects import Counted, Digest, Imported, ImportOptions, label_of, numbers, rectangle
from amltrain.data.sources.own import TableRow
from amltrain.data.sources.pictures import is_picture, tidy_name
from amltrain.errors import UserError, first_line

_SPLITS = ("train", "val", "valid", "test")


def yolo_file(path: Path) -> Path | None:
    """The data.yaml at a path or in a folder; None where there is none with `names`."""
    files = [path] if path.is_file() else sorted([*path.glob("*.yaml"), *path.glob("*.yml")])
    for file in files:
        if file.suffix.lower() in (".yaml", ".yml"):
            start = file.read_bytes()[:65536].decode(errors="replace")
            if "names" in start and any(f"{split}:" in start for split in _SPLITS):
                return file
    return None


def read_yolo(path: Path, options: ImportOptions) -> Imported:
    """Read a data set by its data.yaml. Raises UserError that names file and line."""
    file = yolo_file(path)
    if file is None:
        raise UserError(f"{path} has no data.yaml with names and train")
    try:
        content = yaml.safe_load(read_text(file, options.encoding))
    except yaml.YAMLError as error:
        raise UserError(f"{file} is not YAML ({first_line(error)})") from error
    if not isinstance(content, dict):
        raise UserError(f"{file} is not a mapping with names and train")
    names = _names(content.get("names"), str(file))
    root = (options.images or _root(content, file)).absolute()
    counted, digest = Counted(), Digest()
    digest.add(file.name, file.read_bytes())
    rows: list[TableRow] = []
    for key in _SPLITS:
        for picture in _pictures(content.get(key), root, file):
            rows += _picture_rows(picture, root, split_name(key), names, counted, digest, options.encoding)
    if not rows:
        raise UserError(f"{file}: no label file was found; expected labels/ beside images/ below {root}")
    return Imported(rows, root, {file.name: digest.hexdigest()}, counted.notes(), FrameRule("upright"))


def _names(given: Any, place: str) -> dict[int, str]:
    pairs = enumerate(given) if isinstance(given, list) else given.items() if isinstance(given, dict) else ()
    found: dict[int, str] = {}
    for number, name in pairs:
        if not isinstance(number, int):
            raise UserError(f"{place}: names has the key {number!r}, not a number")
        found[number] = label_of(str(name) if isinstance(name, bool) else name, f"{place}, names")
    if not found:
        raise UserError(f"{place} has no names")
    return found


def _root(content: dict[str, Any], file: Path) -> Path:
    """The folder that train, val and test start from: `path` where it is one on this machine, else the file's own."""
    given = content.get("path")
    stated = file.parent / given if isinstance(given, str) else file.parent
    return stated if stated.is_dir() else file.parent


def _pictures(given: Any, root: Path, file: Path) -> list[Path]:
    """Pictures of one split, sorted. A folder of another machine is looked for by its last parts."""
    entries = given if isinstance(given, list) else [given] if given else []
    found: list[Path] = []
    for entry in entries:
        if not isinstance(entry, str):
            raise UserError(f"{file}: {str(entry)[:80]!r} is not a path")
        place = _existing(tidy_name(entry), root)
        if place is None:
            raise UserError(f"{file}: there is no {entry!r} below {root}; correct it, or give --images")
        if place.is_dir():
            found += sorted(path for path in place.rglob("*") if path.is_file() and is_picture(path))
        else:
            listed = [tidy_name(line) for line in text_lines(read_text(place)) if line.strip()]
            paths = [_existing(name, root) for name in listed]
            missing = next((name for name, path in zip(listed, paths, strict=True) if path is None), None)
            if missing is not None:
                raise UserError(f"{place} lists {missing!r}, which is not below {root}")
            found += [path for path in paths if path is not None]
    return found


def _existing(name: str, root: Path) -> Path | None:
    """A path below the root by as many of its last parts as exist (Roboflow writes ../train/images)."""
    parts = [part for part in name.split("/") if part not in ("", "..")]
    candidates = (root.joinpath(*parts[start:]) for start in range(len(parts)))
    return next((path for path in candidates if path.exists()), None)


def _picture_rows(
    picture: Path,
    root: Path,
    split: str | None,
    names: dict[int, str],
    counted: Counted,
    digest: Digest,
    encoding: str | None,
) -> list[TableRow]:
    if not picture.is_relative_to(root):
        raise UserError(f"{picture} is not below {root}; give --images, a folder above both")
    relative = picture.relative_to(root).as_posix()
    labels = _label_file(picture)
    if labels is None:
        counted.add("pictures have no label file and were left out", relative)
        return []
    text = read_text(labels, encoding)
    digest.add(relative, text.encode(errors="replace"))
    lines = [(number, line.split()) for number, line in enumerate(text_lines(text), 1) if line.strip()]
    if not lines:
        return []
    size = _upright_size(picture)
    rows = []
    for number, words in lines:
        where = f"{labels}, line {number}"
        label, polygon = _line(words, names, size, where)
        place = f"line {number} of {relative}"
        rows.append(TableRow(place, relative, (), [polygon], split, category=label, size=size))
    return rows


def _label_file(picture: Path) -> Path | None:
    """images/.../X.jpg -> labels/.../X.txt (the last folder of that name), or X.txt beside the picture."""
    parts = list(picture.parts)
    places = [i for i, part in enumerate(parts[:-1]) if part == "images"]
    beside = picture.with_suffix(".txt")
    if not places:
        return beside if beside.is_file() else None
    parts[places[-1]] = "labels"
    file = Path(*parts).with_suffix(".txt")
    return file if file.is_file() else beside if beside.is_file() else None


def _upright_size(picture: Path) -> Size:
    try:
        with Image.open(picture) as image:
            return upright_size((image.height, image.width), exif_turn(image))
    except Exception as error:  # Pillow's plugins raise almost anything for a damaged file
        raise UserError(f"{picture} is damaged ({first_line(error)}); remove it and its labels") from error


def _line(words: list[str], names: dict[int, str], size: Size, where: str) -> tuple[str, list[float]]:
    """Label and flat polygon in pixels of one line. Raises UserError."""
    values = numbers(words, None, "the line", where)
    if not values[0].is_integer() or int(values[0]) not in names:
        raise UserError(f"{where}: class {words[0]} is not among the {len(names)} names of the data set")
    shares = values[1:]
    if max(shares, default=0) > 1.5:
        raise UserError(f"{where}: {max(shares):g} is not a share of the picture's side, from 0 to 1")
    if len(shares) == 4:
        x, y, w, h = shares
        shares = rectangle(x - w / 2, y - h / 2, x + w / 2, y + h / 2)
    elif len(shares) < 6 or len(shares) % 2:
        raise UserError(
            f"{where} has {len(shares)} numbers after the class; a box has 4, an outline 6 or more, in pairs"
        )
    return names[int(values[0])], [share * size[1 - i % 2] for i, share in enumerate(shares)]
