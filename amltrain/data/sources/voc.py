"""Pascal VOC: object masks (SegmentationObject), class masks (SegmentationClass), or boxes (Annotations/*.xml).

    JPEGImages/X.jpg  SegmentationObject/X.png  SegmentationClass/X.png  Annotations/X.xml
    ImageSets/Segmentation/train.txt ... (or ImageSets/Main)    labelmap.txt (of CVAT: name:r,g,b::)

Masks have a palette or plain colours. In SegmentationObject every value is an object; 255 of a palette marks pixels
that belong to none. An object's class is the most frequent value of SegmentationClass below it. The format has no
sentences.
"""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from amltrain.data.images import FileFault, decode_file, pixel_values
from amltrain.data.segmentation import encode_mask
from amltrain.data.sources.cells import read_text, split_name, text_lines
from amltrain.data.sources.cvat import parse_xml
from amltrain.data.sources.frame import FrameRule
from amltrain.data.sources.objects import (
    Counted,
    Digest,
    Imported,
    ImportOptions,
    label_of,
    numbers,
    rectangle,
    stated_size,
)
from amltrain.data.sources.own import TableRow
from amltrain.data.sources.pictures import ENDINGS
from amltrain.errors import UserError
from amltrain.files import read_bytes

CLASSES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "dining table", "dog",
    "horse", "motorbike", "person", "potted plant", "sheep", "sofa", "train", "tv monitor",
)  # fmt: skip
"""VOC 2012's classes, whose palette index is their place here plus 1."""
_VOID = 255
_VOID_COLOUR = (224 << 16) + (224 << 8) + 192


def voc_root(path: Path) -> Path | None:
    """The folder with the VOC layout at a path, or the VOC2012 inside a VOCdevkit; None where there is none."""
    for folder in (path, *sorted(path.glob("VOC*")), *sorted(path.glob("VOCdevkit/VOC*"))):
        if (folder / "SegmentationObject").is_dir():
            return folder
        if (folder / "Annotations").is_dir() and (folder / "JPEGImages").is_dir():
            return folder
    return None


def read_voc(path: Path, options: ImportOptions) -> Imported:
    """Read a folder of the VOC layout: object masks where there are any, else boxes. Raises UserError."""
    root = voc_root(path)
    if root is None:
        raise UserError(f"{path} has no SegmentationObject, and no Annotations beside JPEGImages")
    masked = (root / "SegmentationObject").is_dir()
    colours = _label_map(root)
    counted, digest = Counted(), Digest()
    images = options.images or (root / "JPEGImages" if (root / "JPEGImages").is_dir() else root)
    pictures = _pictures(images)
    rows: list[TableRow] = []
    for name, split in _listed(root, masked).items():
        if name not in pictures:
            raise UserError(f"{images} has no picture {name}.jpg, which {root}/ImageSets lists; give --images")
        if masked:
            rows += _mask_rows(root, name, pictures[name], split, colours, counted, digest)
        else:
            rows += _box_rows(root, name, pictures[name], split, digest, counted)
    return Imported(rows, images, {root.name: digest.hexdigest()}, counted.notes(), FrameRule("stored"))


def _pictures(images: Path) -> dict[str, str]:
    """Names of the pictures by their path without an ending."""
    found: dict[str, str] = {}
    for path in sorted(images.rglob("*")):
        if path.suffix.lower() in ENDINGS and path.is_file() and "Segmentation" not in path.parent.name:
            relative = path.relative_to(images).as_posix()
            found[relative[: -len(path.suffix)]] = relative
    return found


def _listed(root: Path, masked: bool) -> dict[str, str | None]:
    """The split of every listed name; without lists, every mask or annotation without a split."""
    folders = [root / "ImageSets" / kind for kind in (("Segmentation", "Main") if masked else ("Main", "Layout"))]
    folder = next((folder for folder in folders if any(folder.glob("*.txt"))), root / "ImageSets")
    found: dict[str, str | None] = {}
    for file in sorted(folder.glob("*.txt")):
        if "_" in file.stem or file.stem == "trainval":
            continue  # lists of one class, and the joint one
        split = None if file.stem.casefold() == "default" else split_name(file.stem)
        for line in text_lines(read_text(file)):
            if (name := line.split()[0] if line.split() else "") and found.setdefault(name, split) != split:
                raise UserError(f"{file}: {name!r} is also in the list of {found[name]}; keep it in one")
    if found:
        return found
    inside, ending = ("SegmentationObject", "*.png") if masked else ("Annotations", "*.xml")
    base = root / inside
    return {path.relative_to(base).as_posix()[:-4]: None for path in sorted(base.rglob(ending))}


def _label_map(root: Path) -> dict[int, str]:
    """Class names by the value of a pixel: of labelmap.txt's colours, else of VOC's palette."""
    file = root / "labelmap.txt"
    if not file.is_file():
        return dict(enumerate(CLASSES, 1))
    found: dict[int, str] = {}
    for number, line in enumerate(text_lines(read_text(file)), 1):
        if not line.strip() or line.startswith("#"):
            continue
        name, *rest = line.split(":")
        where = f"{file}, line {number}"
        red, green, blue = (int(v) for v in numbers((rest or [""])[0].split(","), 3, "the colour", where))
        found[_value(red, green, blue)] = label_of(name, where)
    return found


def _value(red: int, green: int, blue: int) -> int:
    """A colour as `pixel_values` gives it where a picture has colours."""
    return (red << 16) + (green << 8) + blue


def _values(path: Path) -> tuple[NDArray[np.int64], bool, bytes]:
    """A mask file's values, [h, w], whether they are palette indices, and its bytes. Raises UserError."""
    content = read_bytes(path)
    try:
        image = decode_file(content)
    except FileFault as fault:
        raise UserError(f"{path}: {fault}") from fault
    indices = image.mode in ("P", "1") or (image.mode in ("L", "I") and int(np.asarray(image).max()) <= _VOID)
    if indices:
        return pixel_values(image), True, content
    pixels = np.asarray(image.convert("RGB")).astype(np.int64)
    return (pixels[..., 0] << 16) + (pixels[..., 1] << 8) + pixels[..., 2], False, content


def _mask_rows(
    root: Path,
    name: str,
    picture: str,
    split: str | None,
    names: dict[int, str],
    counted: Counted,
    digest: Digest,
) -> list[TableRow]:
    file = root / "SegmentationObject" / f"{name}.png"
    if not file.is_file():
        raise UserError(f"there is no {file}, which {root}/ImageSets lists")
    objects, indices, content = _values(file)
    digest.add(file.name, content)
    class_file = root / "SegmentationClass" / f"{name}.png"
    classes = _class_values(class_file, objects, digest) if class_file.is_file() else None
    void = (_VOID, 0) if indices else (_VOID_COLOUR, 0)
    size = (objects.shape[0], objects.shape[1])
    rows = []
    for value in np.unique(objects).tolist():
        if value in void:
            continue
        mask = objects == value
        category = ""
        if classes is not None:
            below, counts = np.unique(classes[mask], return_counts=True)
            best = int(below[counts.argmax()])
            if best in (0, *void):
                counted.add("objects have no class below them", f"value {value} of {file.name}")
            elif best not in names:
                counted.add("objects have a class that is not named", f"value {best} of {class_file.name}")
                category = f"class {best}"
            else:
                category = names[best]
        place = f"object {value} of {name}"
        rows.append(
            TableRow(place, picture, (), encode_mask(mask.astype(np.uint8)), split, category=category, size=size)
        )
    return rows


def _class_values(file: Path, objects: NDArray[np.int64], digest: Digest) -> NDArray[np.int64]:
    classes, _, content = _values(file)
    digest.add(file.name, content)
    if classes.shape != objects.shape:
        raise UserError(f"{file} has another size than the mask of its objects: {classes.shape} and {objects.shape}")
    return classes


def _box_rows(
    root: Path, name: str, picture: str, split: str | None, digest: Digest, counted: Counted
) -> list[TableRow]:
    file = root / "Annotations" / f"{name}.xml"
    if not file.is_file():
        counted.add("pictures have no annotation file and were left out", name)
        return []
    content = read_bytes(file)
    digest.add(file.name, content)
    tree = parse_xml(content, str(file))
    height, width = tree.findtext("size/height"), tree.findtext("size/width")
    known = height not in (None, "0") and width not in (None, "0")
    size = stated_size(height, width, str(file)) if known else None
    rows = []
    for number, entry in enumerate(tree.findall("object")):
        where = f"{file}, object {number}"
        corners = [entry.findtext(f"bndbox/{side}") for side in ("xmin", "ymin", "xmax", "ymax")]
        x0, y0, x1, y1 = numbers(corners, 4, "the box", where)
        polygon = rectangle(x0 - 1, y0 - 1, x1, y1)  # VOC counts pixels from 1, both ends included
        label = label_of(entry.findtext("name"), where)
        rows.append(TableRow(f"object {number} of {name}", picture, (), [polygon], split, category=label, size=size))
    return rows
