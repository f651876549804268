"""Give the objects of an importer sentences: read each picture once, and describe its objects together."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps
from tqdm import tqdm

from amltrain.data.images import FileFault, read_image_file, to_rgb
from amltrain.data.segmentation import BrokenSegmentationError, decode_mask, referent_mask
from amltrain.data.sources.annotations import MaskFile
from amltrain.data.sources.describe import DescribeOptions, Instance, describe_picture
from amltrain.data.sources.frame import FrameRule, establish, in_frame
from amltrain.data.sources.objects import Imported
from amltrain.data.sources.own import TableRow
from amltrain.data.sources.pictures import PictureFinder
from amltrain.errors import UserError


class _Picture(NamedTuple):
    """image: RGB in the frame of the masks. instances: of the rows, in their order."""

    image: Image.Image
    instances: list[Instance]


def describe_rows(imported: Imported, options: DescribeOptions, *, links: bool = False) -> Imported:
    """The rows with sentences for those that have none, and rows of negatives; objects that no sentence fits are left
    out and counted. Raises UserError without classes.
    """
    if not any(row.category for row in imported.rows):
        raise UserError("--describe needs the objects' classes, and the annotations name none")
    by_image: dict[str, list[TableRow]] = {}
    finder = PictureFinder(imported.images)
    for row in imported.rows:
        by_image.setdefault(finder.find(row.image) or row.image, []).append(row)
    classes = sorted({row.category for row in imported.rows if row.category})
    rows: list[TableRow] = []
    left_out = written = 0
    for name, own in tqdm(by_image.items(), desc="describe", unit="image", leave=False, disable=None):
        picture = _read(imported.images, name, own, imported.rule, links)
        found = describe_picture(picture.image, picture.instances, name, options, classes) if picture else []
        for number, row in enumerate(own):
            texts = tuple(sentence.text for sentence in found if sentence.target == number)
            if row.sentences or texts:
                rows.append(row if row.sentences else row._replace(sentences=texts))
                written += 0 if row.sentences else len(texts)
            else:
                left_out += 1
        negatives = tuple(sentence.text for sentence in found if sentence.target is None)
        if negatives:
            first = own[0]
            rows.append(TableRow(f"negatives of {name}", first.image, negatives, None, first.split, size=first.size))
            written += len(negatives)
    if not rows:
        raise UserError(f"no sentence fits one of the {left_out:,} objects alone; are the masks and classes right?")
    note = f"{written:,} sentences were written (seed {options.seed}); no sentence fits {left_out:,} objects alone"
    return imported._replace(rows=rows, notes=(*imported.notes, note))


def _read(root: Path, name: str, rows: Sequence[TableRow], rule: FrameRule, links: bool) -> _Picture | None:
    """A picture and its objects in one frame; None for one that cannot be read."""
    try:
        file = read_image_file(root.resolve(), name, links)
        frame = establish((file.height, file.width), file.turn, rows[0].size, rule)
    except FileFault:
        return None
    with Image.open(io.BytesIO(file.content)) as opened:
        image = to_rgb(ImageOps.exif_transpose(opened) if frame.upright else opened, name)
    instances = []
    for row in rows:
        mask = np.zeros((frame.height, frame.width), np.uint8)
        try:
            if row.segmentation is not None and not isinstance(row.segmentation, MaskFile):
                fitted, _ = in_frame(row.segmentation, frame)
                mask = decode_mask(referent_mask([fitted], frame.height, frame.width).union)
        except BrokenSegmentationError:
            pass  # an empty mask is not described
        instances.append(Instance(row.category, mask, row.crowd))
    return _Picture(image, instances)
