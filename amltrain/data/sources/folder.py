"""Your own data as a folder of files: for every `X.txt` (a sentence a line) an image `X.jpg` and a mask `X_mask.png`.

`images/X.jpg`, `masks/X.png` and `texts/X.txt` are the same; folders named after the splits may hold them.
"""

import hashlib
from pathlib import Path

from amltrain.data.sources.annotations import Annotations, MaskFile
from amltrain.data.sources.cells import clean_sentence, read_text, text_lines
from amltrain.data.sources.own import TableRow, build_annotations, check_name
from amltrain.data.sources.pictures import ENDINGS
from amltrain.data.sources.table import AS_WRITTEN, ReadOptions
from amltrain.errors import UserError
from amltrain.files import sha256

_PARTS = {"images", "masks", "texts"}
_ABOUT = {"classes", "labels", "readme", "license", "licence", "notes", "obj", "requirements", "predefined_classes"}
"""Names of text files that tools put beside pictures; they hold no sentences."""
_MASK_ENDINGS = (".png", ".tif", ".tiff", ".bmp")


def read_folder(folder: Path, name: str, options: ReadOptions = AS_WRITTEN) -> Annotations:
    """Read a folder of files.

    Endings may be in capitals. Text files about the data set (classes.txt) are left out and noted. Raises UserError
    naming the file that is missing.
    """
    check_name(name)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    texts = [path for path in files if path.suffix.lower() == ".txt"]
    if not texts:
        raise UserError(f"{folder} has no .txt file; put the sentences of X.jpg in X.txt, one a line")
    by_name = {path.with_suffix(path.suffix.lower()): path for path in files}
    splits = {path.name for path in folder.iterdir() if path.is_dir()} - _PARTS
    about = [path for path in texts if path.stem.casefold() in _ABOUT and _image(path, by_name)[0] is None]
    rows = [_folder_row(path, folder, splits, by_name, options) for path in texts if path not in about]
    if not rows:
        raise UserError(f"{folder} has only {about[0].name}; put the sentences of X.jpg in X.txt, one a line")
    notes = (
        (f"{len(about)} text files are about the data set and were left out (e.g. {about[0].name})",) if about else ()
    )
    digest = hashlib.sha256()
    for row in rows:
        mask = folder / row.segmentation.name
        digest.update(f"{row.image} {row.sentences} {row.segmentation.name} {sha256(mask)}\n".encode(errors="replace"))
    return build_annotations(
        rows,
        name,
        sources={folder.name: digest.hexdigest()},
        place=str(folder),
        seed=options.seed,
        shares=options.shares,
        notes=notes,
        rule=options.rule,
        links=options.links,
        pictures=folder,
    )


def _image(text: Path, by_name: dict[Path, Path]) -> tuple[Path | None, Path]:
    """The image of a text file, None if there is none, and the path where it was expected."""
    base = text.parent if text.parent.name != "texts" else text.parent.parent / "images"
    wanted = [base / f"{text.stem}{ending}" for ending in ENDINGS]
    return next((by_name[path] for path in wanted if path in by_name), None), wanted[0]


def _folder_row(
    text: Path, folder: Path, splits: set[str], by_name: dict[Path, Path], options: ReadOptions
) -> TableRow:
    sentences = [clean_sentence(line) for line in text_lines(read_text(text, options.encoding))]
    base = text.parent if text.parent.name != "texts" else text.parent.parent
    image, wanted = _image(text, by_name)
    masks = [base / f"{text.stem}{mark}{end}" for end in _MASK_ENDINGS for mark in ("_mask", ".mask")]
    masks += [base / "masks" / f"{text.stem}{end}" for end in _MASK_ENDINGS]
    mask = next((by_name[path] for path in masks if path in by_name), None)
    if image is None:
        raise UserError(f"{text} has no image; expected {wanted}")
    if mask is None:
        raise UserError(f"{text} has no mask; expected {masks[0]}")
    relative = image.relative_to(folder).as_posix()
    first = relative.split("/")[0]
    return TableRow(
        place=text.relative_to(folder).as_posix(),
        image=relative,
        sentences=tuple(sentence for sentence in sentences if sentence),
        segmentation=MaskFile(folder.resolve(), mask.relative_to(folder).as_posix(), None, options.mask_threshold),
        split=first if first in splits else None,
    )
