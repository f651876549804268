"""The forms in which tools write a mask, each told from the others by its shape and never by guessing.

    [x, y, x, y, ...]                           one polygon
    [[x, y, x, y, ...], ...]                    polygons
    [[x, y], ...]  [{"x": x, "y": y}, ...]      one polygon of points
    [[[x, y], ...], ...]                        polygons of points; the same one level deeper, by instance
    {"size": [h, w], "counts": text or list}    COCO run lengths, compressed or not; a list of them
    [[0, 0, 1, ...], ...], arrays               a bitmap: as many rows and columns as the picture has
    "iVBOR...", bytes                           a PNG, its pixels 0 and one other value
    {"format": "rle", "rle": [...]}             Label Studio's brush

What fits none of them is rejected with the form that it looks like.
"""

import base64
import binascii
import io
import re
import reprlib
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from amltrain.data.images import pixel_values
from amltrain.data.segmentation import MAX_PIXELS, BrokenSegmentationError, encode_mask

_PNG = b"\x89PNG"
_KAGGLE = re.compile(r"\d+(?: \d+)+")
_WKT = re.compile(r"\s*(MULTI)?POLYGON\s*[ZM]*\s*\(", re.IGNORECASE)


def canonical(mask: Any, size: tuple[int, int], scale: tuple[float, float] = (1.0, 1.0)) -> Any:
    """A mask of any form as a list of flat polygons, run lengths, or a list of run lengths.

    size: height and width of the picture's frame; scale: the frame's factors, with which the annotations' own size
    follows. Both tell a bitmap from polygons. Numbers are checked where the mask is drawn. Raises
    BrokenSegmentationError.
    """
    if isinstance(mask, (bytes, str)):
        return encode_mask(_encoded_picture(mask))
    if isinstance(mask, np.ndarray):
        mask = mask.tolist()
    if isinstance(mask, dict):
        return _run_lengths(mask)
    if not isinstance(mask, (list, tuple)) or not mask:
        raise BrokenSegmentationError("it has no polygon and no run lengths")
    first = mask[0]
    if isinstance(first, dict):
        return [_point_list(mask)] if "x" in first else [_run_lengths(rle) for rle in mask]
    if _is_number(first):
        return [list(mask)]
    if isinstance(first, str):
        raise BrokenSegmentationError("its coordinates are texts; write them as numbers")
    if not isinstance(first, (list, tuple)) or not first:
        return [list(part) if isinstance(part, tuple) else part for part in mask]  # named where it is drawn
    if _is_number(first[0]):
        return _flat_or_points(mask, size, scale)
    if isinstance(first[0], bool):
        return encode_mask(_bitmap(mask))
    if isinstance(first[0], str):
        raise BrokenSegmentationError("its coordinates are texts; write them as numbers")
    return _nested(mask, size, scale)


def _flat_or_points(mask: Any, size: tuple[int, int], scale: tuple[float, float]) -> Any:
    """A list of lists of numbers: one polygon of points, flat polygons, or a bitmap."""
    width = len(mask[0])
    if width == 2 and all(_is_pair(point) for point in mask):
        return [_point_list(mask)]
    if _may_be_bitmap(mask):
        stated = (round(size[0] / scale[1]), round(size[1] / scale[0]))
        if (len(mask), width) in (size, stated):
            return encode_mask(_bitmap(mask))
        if max(map(max, mask)) <= 1 and len(mask) > 1:  # as polygons they would cover no pixel
            raise BrokenSegmentationError(
                f"it looks like a bitmap of {len(mask)} x {width} pixels, the picture has {size[0]} x {size[1]}"
            )
    return [list(polygon) if isinstance(polygon, (list, tuple)) else polygon for polygon in mask]


def _may_be_bitmap(mask: Any) -> bool:
    """Whether all rows are as long as the first and hold 0 and one other value."""
    width = len(mask[0])
    if len(mask) < 2 or not all(isinstance(row, (list, tuple)) and len(row) == width for row in mask):
        return False
    try:
        values = {value for row in mask for value in row}
    except TypeError:  # a list among the numbers
        return False
    return values <= {0, 1} or values <= {0, 255}


def _bitmap(mask: Any) -> NDArray[np.uint8]:
    try:
        array = np.asarray(mask)
    except ValueError:
        array = np.zeros(0, object)
    if array.ndim != 2 or array.dtype == object or not array.size:
        raise BrokenSegmentationError("its rows of pixels are not equally long")
    return (array != 0).astype(np.uint8)


def _nested(mask: Any, size: tuple[int, int], scale: tuple[float, float]) -> Any:
    """Lists of lists of lists: polygons of points, polygons by instance, or a bitmap with a channel."""
    first = mask[0][0]
    if isinstance(first, (list, tuple)) and len(first) == 1 and len(mask) in (1, size[0]) and _is_number(first[0]):
        return canonical([[pixel[0] for pixel in row] for row in mask], size, scale)  # [h, w, 1]
    if len(mask) == 1 and isinstance(first, (list, tuple)) and (len(mask[0]), len(first)) == size:
        return canonical(mask[0], size, scale)  # [1, h, w]
    found: list[Any] = []
    for part in mask:
        if not isinstance(part, (list, tuple)) or not part:
            found.append(part)
            continue
        if isinstance(part[0], dict) or all(_is_pair(point) for point in part):
            found.append(_point_list(part))
        elif all(isinstance(polygon, (list, tuple)) for polygon in part):
            inner = canonical(list(part), size, scale)
            if isinstance(inner, dict):
                raise BrokenSegmentationError("it mixes bitmaps and polygons; give one bitmap for each object")
            found += inner
        else:
            raise BrokenSegmentationError(f"it has a part that is not a polygon: {reprlib.repr(part)}")
    return found


def _point_list(points: Any) -> list[Any]:
    """[[x, y], ...] or [{"x": x, "y": y}, ...] -> [x, y, x, y, ...]."""
    flat: list[Any] = []
    for point in points:
        if isinstance(point, dict):
            if not {"x", "y"} <= point.keys():
                raise BrokenSegmentationError(f"it has a point without x or y: {reprlib.repr(point)}")
            flat += [point["x"], point["y"]]
        elif isinstance(point, (list, tuple)) and len(point) == 2:
            flat += point
        else:
            raise BrokenSegmentationError(f"it has a point that is not [x, y]: {reprlib.repr(point)}")
    return flat


def _run_lengths(rle: Any) -> dict[str, Any]:
    """Run lengths in one of their spellings as {"size", "counts"}; the counts are checked where they are decoded."""
    if not isinstance(rle, dict):
        raise BrokenSegmentationError("it mixes run lengths and polygons")
    if rle.get("format") == "rle" and "rle" in rle:
        return encode_mask(brush_mask(rle["rle"], rle.get("original_height"), rle.get("original_width")))
    if "counts" not in rle:
        kind = "a GeoJSON geometry" if "coordinates" in rle else "an object with the keys " + ", ".join(map(str, rle))
        raise BrokenSegmentationError(f"it is {kind[:200]}, not run lengths (size, counts)")
    size, counts = rle.get("size"), rle["counts"]
    if size is None and {"height", "width"} <= rle.keys():
        size = [rle["height"], rle["width"]]
    if isinstance(size, np.ndarray):
        size = size.tolist()
    if isinstance(size, (list, tuple)):
        size = [int(side) if isinstance(side, float) and side.is_integer() else side for side in size]
    if isinstance(counts, np.ndarray):
        counts = counts.tolist()
    if isinstance(counts, str) and counts[:2] in ("b'", 'b"') and counts[-1:] == counts[1]:
        counts = _bytes_repr(counts)
    if isinstance(counts, (list, tuple)):
        counts = [int(c) if isinstance(c, float) and c.is_integer() else c for c in counts]
    return {"size": size, "counts": counts}


def _bytes_repr(text: str) -> str:
    """The text of Python's repr of bytes, as `str(rle["counts"])` writes it."""
    import ast

    try:
        return ast.literal_eval(text).decode("ascii")
    except (ValueError, SyntaxError, UnicodeDecodeError) as error:
        raise BrokenSegmentationError("its counts are a damaged repr of bytes") from error


def _encoded_picture(mask: bytes | str) -> NDArray[np.uint8]:
    """A PNG file's bytes, or their base64, as [h, w] of 0 and 1."""
    if isinstance(mask, str):
        text = mask.partition("base64,")[2] if mask.startswith("data:") else mask
        if not text.startswith("iVBOR"):
            raise BrokenSegmentationError(_text_form(mask))
        try:
            mask = base64.b64decode("".join(text.split()), validate=True)
        except (binascii.Error, ValueError) as error:
            raise BrokenSegmentationError("its base64 text is damaged") from error
    if not mask.startswith(_PNG):
        raise BrokenSegmentationError("its bytes are not a PNG")
    return png_mask(mask)


def _text_form(text: str) -> str:
    if _KAGGLE.fullmatch(text.strip()):
        return "it looks like run lengths of pairs (start, length), whose order is unknown; write COCO's run lengths"
    if _WKT.match(text):
        return "it is WKT; write polygons as lists of coordinates"
    return f"the text {reprlib.repr(text)} is neither a mask file nor JSON"


def png_mask(content: bytes) -> NDArray[np.uint8]:
    """A PNG's pixels as [h, w] of 0 and 1. Raises BrokenSegmentationError where it has more than one value beside 0."""
    try:
        image = Image.open(io.BytesIO(content))
        if image.width * image.height > MAX_PIXELS:
            raise BrokenSegmentationError("its PNG is too large")
        values = pixel_values(image)
    except BrokenSegmentationError:
        raise
    except Exception as error:  # Pillow's plugins raise almost anything for a damaged file
        raise BrokenSegmentationError("its PNG is damaged") from error
    if len(np.unique(values[values != 0])) > 1:
        raise BrokenSegmentationError("its PNG has several values beside 0")
    return (values != 0).astype(np.uint8)


def brush_mask(numbers: Any, height: Any, width: Any) -> NDArray[np.uint8]:
    """Label Studio's brush: a bit stream of run-length coded RGBA bytes -> [height, width] of 0 and 1.

    32 bits: how many values; 5: bits per value, less 1; four times 4: bits of a run length by its class, less 1. Then
    until all values are there: 1 bit (a run of one value, or single ones), 2 bits (the class), the length less 1, and
    the value or the values. A pixel is in the mask where its fourth value is not 0. Raises BrokenSegmentationError.
    """
    wrong = BrokenSegmentationError("its brush run lengths are damaged")
    if not (type(height) is int and type(width) is int) or not 0 < height * width <= MAX_PIXELS:
        raise BrokenSegmentationError("its brush run lengths come without original_height and original_width")
    try:
        bits = np.unpackbits(np.asarray(numbers, np.uint8))
    except (ValueError, TypeError, OverflowError) as error:
        raise wrong from error
    place = 0

    def take(count: int) -> int:
        nonlocal place
        if place + count > len(bits):
            raise wrong
        value = 0
        for bit in bits[place : place + count].tolist():
            value = value * 2 + bit
        place += count
        return value

    total, word = take(32), take(5) + 1
    lengths = [take(4) + 1 for _ in range(4)]
    if total != height * width * 4:
        raise BrokenSegmentationError(f"its brush has {total // 4} pixels, its size says {height} x {width}")
    values = np.zeros(total, np.int64)
    done = 0
    weights = 1 << np.arange(word - 1, -1, -1)
    while done < total:
        run = take(1)
        length = take(lengths[take(2)]) + 1
        if done + length > total:
            raise wrong
        if run:
            values[done : done + length] = take(word)
        else:
            if place + length * word > len(bits):
                raise wrong
            values[done : done + length] = bits[place : place + length * word].reshape(length, word) @ weights
            place += length * word
        done += length
    return (values.reshape(height, width, 4)[..., 3] > 0).astype(np.uint8)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_pair(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and len(value) == 2 and not isinstance(value[0], (list, tuple, dict))
