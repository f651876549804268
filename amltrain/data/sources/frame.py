"""The frame of a picture: which pixels its annotations mean. Every origin's masks and boxes pass through here.

A picture has stored pixels, and EXIF data that may ask viewers to turn them. Annotations mean one of the two, perhaps
at another scale: tools show pictures upright, COCO's polygons fit the stored pixels, and pictures are resized after
they were annotated. The sizes decide: what the annotations state, else the size of a mask, else the user.

    stated = stored size                 stored pixels
    stated = upright size                upright pixels
    stated = one of them, scaled         that one; coordinates and masks are scaled, and the row is counted
    none of these                        rejected, or stretched where a data set is known to need it
    nothing stated, or both fit          rejected where EXIF turns the picture; `--exif` answers
"""

import io
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from amltrain.data.images import FileFault
from amltrain.data.segmentation import BrokenSegmentationError, decode_mask, encode_mask
from amltrain.data.sources.mask_forms import canonical
from amltrain.errors import UserError

Exif = Literal["auto", "stored", "upright"]
Size = tuple[int, int]
"""Height and width, pixels."""
SCALED = "pictures have another size than their annotations state; the annotations were scaled"
STRETCHED = "pictures have other proportions than their annotations state; the annotations were stretched"
UPRIGHT = "pictures are turned upright as their EXIF data asks; their annotations fit the upright pictures"
STORED = "pictures have EXIF data that asks to turn them; their annotations fit the stored pixels"
RESIZED = "masks have another size than their pictures; they were scaled"
_ASK = (
    "its EXIF data asks to turn it (orientation {}), and no size tells whether its annotations fit the stored or the "
    "upright picture; give --exif upright (annotation tools) or --exif stored (COCO)"
)


class FrameRule(NamedTuple):
    """What decides where sizes do not. exif: see the module. stretch: accept any stated size (RRSIS-D)."""

    exif: Exif = "auto"
    stretch: bool = False


SIZES_DECIDE = FrameRule()
"""Own data: where sizes do not decide, the user is asked."""
COCO_RULE = FrameRule("stored")
"""Published sets in COCO's and REFER's layouts: polygons fit the stored pixels."""


class Frame(NamedTuple):
    """height, width: of the pixels that every mask is drawn on. scale: factors (x, y) of stated coordinates. upright:
    whether the picture is turned. rewrite: the size cannot tell so later, the picture itself must be turned. noticed:
    what a person should know, a constant of this module.
    """

    height: int
    width: int
    scale: tuple[float, float] = (1.0, 1.0)
    upright: bool = False
    rewrite: bool = False
    stretch: bool = False
    noticed: tuple[str, ...] = ()


def upright_size(size: Size, turn: int) -> Size:
    """Height and width after the EXIF orientation `turn` is applied."""
    return (size[1], size[0]) if turn >= 5 else size


def establish(stored: Size, turn: int, stated: Size | None, rule: FrameRule) -> Frame:
    """Decide the frame of one picture.

    stored: of the file. turn: its EXIF orientation. stated: size that the annotations state, or that of a mask; None
    where nothing states one. Raises FileFault with the reason where no frame fits or two do.
    """
    upright = upright_size(stored, turn)
    if stated is None:
        return _turned(stored, turn, None, rule)
    if stated in (stored, upright):
        if turn == 1:
            return Frame(*stored)
        if stored != upright:
            return _upright(upright, turn) if stated == upright else Frame(*stored, noticed=(STORED,))
        return _turned(stored, turn, None, rule)
    fits_stored, fits_upright = same_proportions(stated, stored), same_proportions(stated, upright)
    if fits_stored and fits_upright:
        return _scaled(_turned(stored, turn, stated, rule), stated)
    if fits_stored or fits_upright:
        frame = Frame(*stored) if fits_stored else _upright(upright, turn)
        return _scaled(frame, stated)
    if rule.stretch:
        frame = _turned(stored, turn, stated, rule) if turn > 1 else Frame(*stored)
        return _scaled(frame, stated)._replace(stretch=True, noticed=(*frame.noticed, STRETCHED))
    raise FileFault(_unfit(stored, stated))


def _unfit(stored: Size, stated: Size) -> str:
    swapped = "; height and width are exchanged" if stated == stored[::-1] else "; is it another picture?"
    return f"it is {stored[0]} x {stored[1]} pixels, its annotations say {stated[0]} x {stated[1]}{swapped}"


def same_proportions(one: Size, other: Size) -> bool:
    """Whether one is the other resized by a single factor, both sides rounded, both cut, or both rounded up."""

    def resized(given: Size, result: Size, below: float, above: float) -> bool:
        low = max((after - below) / before for before, after in zip(given, result, strict=True))
        high = min((after + above) / before for before, after in zip(given, result, strict=True))
        return low <= high

    rounding = ((0.5, 0.5), (0.0, 0.999), (0.999, 0.0))
    return any(resized(a, b, *how) for a, b in ((one, other), (other, one)) for how in rounding)


def _turned(stored: Size, turn: int, stated: Size | None, rule: FrameRule) -> Frame:
    """The frame by the rule, where sizes do not decide."""
    if turn == 1:
        return Frame(*stored)
    if rule.exif == "auto":
        raise FileFault(_ASK.format(turn))
    if rule.exif == "stored":
        return Frame(*stored, noticed=(STORED,))
    return _upright(upright_size(stored, turn), turn)


def _upright(size: Size, turn: int) -> Frame:
    """An upright frame. Prepared rows state a size and nothing else, so a turn that keeps the size is written out."""
    return Frame(*size, upright=True, rewrite=turn < 5 or size[0] == size[1], noticed=(UPRIGHT,))


def _scaled(frame: Frame, stated: Size) -> Frame:
    scale = (frame.width / stated[1], frame.height / stated[0])
    return frame._replace(scale=scale, noticed=(*frame.noticed, SCALED))


def upright_content(content: bytes) -> bytes:
    """An image file as the same pixels turned upright, as PNG without EXIF data."""
    with Image.open(io.BytesIO(content)) as image:
        turned = ImageOps.exif_transpose(image)
    turned.info.pop("exif", None)
    written = io.BytesIO()
    turned.save(written, "PNG", icc_profile=image.info.get("icc_profile"))
    return written.getvalue()


def in_frame(segmentation: Any, frame: Frame) -> tuple[Any, tuple[str, ...]]:
    """A mask in any form -> polygons or run lengths in the frame's pixels, and what to notice.

    Raises BrokenSegmentationError with the reason for a form that is unknown or a size that does not fit.
    """
    size = (frame.height, frame.width)
    given = canonical(segmentation, size, frame.scale)
    if isinstance(given, dict):
        fitted, resized = _fit_run_lengths(given, frame)
        return fitted, (RESIZED,) if resized else ()
    if given and isinstance(given[0], dict):
        fitted_all = [_fit_run_lengths(rle, frame) for rle in given]
        return [rle for rle, _ in fitted_all], (RESIZED,) if any(resized for _, resized in fitted_all) else ()
    return scale_polygons(given, frame.scale), ()


def scale_polygons(polygons: Any, scale: tuple[float, float]) -> Any:
    """Flat polygons by the factors (x, y). Coordinates that are not numbers stay, to be named where they are drawn."""
    if scale == (1.0, 1.0):
        return polygons
    return [
        [c * scale[i % 2] if type(c) in (int, float) else c for i, c in enumerate(polygon)]
        if isinstance(polygon, list)
        else polygon
        for polygon in polygons
    ]


def scale_box(box: Sequence[float], scale: tuple[float, float]) -> list[float]:
    """A box x, y, width, height by the factors (x, y)."""
    return [value * scale[i % 2] for i, value in enumerate(box)] if scale != (1.0, 1.0) else list(box)


def _fit_run_lengths(rle: dict[str, Any], frame: Frame) -> tuple[dict[str, Any], bool]:
    """Run lengths of the frame's size, and whether they had another one."""
    size = rle.get("size")
    if not isinstance(size, (list, tuple)) or len(size) != 2 or not all(type(side) is int for side in size):
        return rle, False  # named where it is decoded
    if tuple(size) == (frame.height, frame.width):
        return rle, False
    try:
        mask = decode_mask(rle)
    except UserError as error:
        raise BrokenSegmentationError(str(error).removeprefix("the mask cannot be decoded: ")) from error
    return encode_mask(fit_bitmap(mask, frame)), True


def fit_bitmap(mask: NDArray[np.uint8], frame: Frame) -> NDArray[np.uint8]:
    """A mask [h, w] of 0 and 1 at the frame's size, by nearest pixels. Raises BrokenSegmentationError.

    Only a mask of the frame's proportions is the same mask at another scale; a stretched frame takes any.
    """
    size = (frame.height, frame.width)
    given: Size = (mask.shape[0], mask.shape[1])
    if given == size:
        return mask
    if not frame.stretch and not same_proportions(given, size):
        swapped = "; its height and width are exchanged" if given == size[::-1] else ""
        raise BrokenSegmentationError(f"its mask is for size {list(given)}, the picture is {list(size)}{swapped}")
    return mask[_nearest(given[0], size[0])][:, _nearest(given[1], size[1])]


def _nearest(given: int, wanted: int) -> NDArray[np.int64]:
    """For every wanted pixel the index of the given one at the same place."""
    return ((np.arange(wanted) + 0.5) * given / wanted).astype(np.int64).clip(0, given - 1)


def stated_by_mask(segmentation: Any) -> Size | None:
    """Height and width that a mask's own form states: run lengths do, polygons do not."""
    first = segmentation[0] if isinstance(segmentation, list) and segmentation else segmentation
    size = first.get("size") if isinstance(first, dict) else None
    if isinstance(size, (list, tuple)) and len(size) == 2 and all(type(side) is int and side > 0 for side in size):
        return (size[0], size[1])
    return None
