"""Decode images, and turn images of any mode into RGB of 8 bits per channel.

Image and mask files below a folder: which paths are allowed, and which files can be decoded.
"""

import io
import os
import stat
from pathlib import Path, PurePosixPath
from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor

from amltrain.errors import UserError, first_line

Decoder = Literal["pil", "torchvision"]


def decode_image(content: bytes, name: str, size: tuple[int, int], decoder: Decoder = "pil") -> Image.Image | Tensor:
    """Decode an image file as RGB.

    size: (height, width) that the masks were drawn at. An image of the transposed size is rotated by its EXIF tag;
    any other keeps its stored pixels, as COCO's masks expect.
    decoder: `torchvision` decodes ordinary JPEGs into a [3, h, w] uint8 tensor, with the same pixels as Pillow; other
    files are decoded by Pillow. name: what to call the image in an error.
    Raises UserError for bytes that cannot be decoded.
    """
    try:
        image = Image.open(io.BytesIO(content))  # reads the header only
        turned = image.size != size[::-1] and image.size == size
        if image.size != size[::-1] and not turned:
            raise OSError(f"it is {image.height} x {image.width} pixels, its masks are {size[0]} x {size[1]}")
        if decoder == "torchvision" and not turned and _is_plain_jpeg(image, content):
            return _decode_jpeg(content)
        return to_rgb(ImageOps.exif_transpose(image) if turned else image, name)
    except UserError:
        raise
    except Exception as error:  # Pillow's plugins raise almost anything for a damaged file
        raise UserError(
            f"{name} cannot be decoded ({first_line(error)}); remove the prepared folder and prepare it again"
        ) from error


def to_rgb(image: Image.Image, name: str = "the image") -> Image.Image:
    """Convert an image to RGB. 16-bit grey keeps its upper 8 bits, as Pillow reads 16-bit colour.

    name: what to call the image in an error. Raises UserError for float pixels and for integers beyond 16 bits, whose
    white is unknown.
    """
    if image.mode == "F":
        raise UserError(f"{name} has float pixels, whose white is unknown; save it as an 8- or 16-bit PNG")
    if image.mode.startswith("I"):  # 32 bits, or I;16 in either byte order
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 65535:
            raise UserError(
                f"{name} has pixels from {values.min()} to {values.max()}, beyond 16 bits; "
                "save it as an 8- or 16-bit PNG"
            )
        image = Image.fromarray((values >> 8).astype(np.uint8))  # Pillow's own conversion turns all above 255 white
    return image.convert("RGB")


def _is_plain_jpeg(image: Image.Image, content: bytes) -> bool:
    """Whether torchvision decodes this file as Pillow does: a JPEG in colour or grey that is not truncated."""
    return image.format == "JPEG" and image.mode in ("RGB", "L") and b"\xff\xd9" in content[-64:]


def _decode_jpeg(content: bytes) -> Tensor:
    from torchvision.io import ImageReadMode, decode_jpeg  # slow to import

    encoded = torch.frombuffer(bytearray(content), dtype=torch.uint8)
    try:
        return decode_jpeg(encoded, mode=ImageReadMode.RGB)
    except RuntimeError as error:
        raise OSError(str(error)) from error


MAX_FILE_BYTES = 2**29
MAX_PIXELS = 2 * 89_478_485
"""Pillow's own limit, above which it takes an image for a decompression bomb."""
EXIF_ORIENTATION = 0x0112
"""The EXIF tag: 1 = as stored, 2 to 8 = mirrored or turned, 5 to 8 exchange the sides."""


def exif_turn(image: Image.Image) -> int:
    """EXIF orientation of an opened image, 1 to 8; 1 where the tag is missing or is none of these."""
    value = image.getexif().get(EXIF_ORIENTATION, 1)
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


class FileFault(Exception):  # noqa: N818 - a reason, counted and shown
    """A file that cannot be used; the message is the reason."""


class ImageFile(NamedTuple):
    """content: the file's own bytes. height, width: of the stored pixels. turn: its EXIF orientation, 1 to 8."""

    content: bytes
    height: int
    width: int
    turn: int = 1


def path_below(root: Path, name: str, links: bool = False) -> Path:
    """`root / name`, which must lie below `root`. Raises FileFault for an absolute path, `..`, or a link that leaves.

    root: resolved, or relative to the working folder. links: links may lead anywhere. Messages give its name, not its
    path, because they are published with the data.
    """
    pure = PurePosixPath(name.replace("\\", "/"))
    if not pure.parts or "\0" in name or pure.is_absolute() or ".." in pure.parts or ":" in pure.parts[0]:
        shown = pure.name if pure.is_absolute() else name[:200]
        raise FileFault(f"the path {shown!r} leads outside the folder {root.name}")
    root = root if root.is_absolute() else root.resolve()
    path = root / pure
    try:
        real = path.resolve()
    except (OSError, RuntimeError, ValueError) as error:  # a circle of links, half of a surrogate pair
        raise FileFault(f"the file cannot be reached ({first_line(error)})") from error
    if real != path and not links and not real.is_relative_to(root):
        raise FileFault(
            f"it is a link that leads outside the folder {root.name}; where you trust the links' targets (the Hub's "
            f"cache, DVC, git-annex), prepare with --follow_links"
        )
    return real


def read_file_below(root: Path, name: str, links: bool = False) -> bytes:
    """The bytes of a regular file below `root`. Raises FileFault; never waits for a pipe or a device."""
    path = path_below(root, name, links)
    try:
        # opened without waiting and checked when open, so that the file cannot be exchanged in between
        with open(os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0)), "rb") as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise FileFault("it is not a regular file")
            if status.st_size > MAX_FILE_BYTES:
                raise FileFault(f"the file has {status.st_size:,} bytes, more than {MAX_FILE_BYTES:,}")
            return file.read()
    except FileNotFoundError as error:
        raise FileFault(f"the file is missing in {root.name}") from error
    except OSError as error:
        raise FileFault(f"the file cannot be read ({error.strerror or error})") from error


def read_image_file(root: Path, name: str, links: bool = False) -> ImageFile:
    """Read an image and decode it once. Raises FileFault if it cannot be used later."""
    content = read_file_below(root, name, links)
    image = decode_file(content)
    if image.mode not in ("RGB", "L"):
        try:
            to_rgb(image, "it")
        except Exception as error:  # a mode or a palette that Pillow cannot convert
            raise FileFault(f"the file is damaged ({first_line(error)})") from error
    return ImageFile(content, image.height, image.width, exif_turn(image))


def read_mask_file(
    root: Path,
    name: str,
    value: int | None = None,
    threshold: int | None = None,
    links: bool = False,
) -> NDArray[np.uint8]:
    """A mask file as [height, width] uint8, 0 or 1, at its own size.

    value: the pixel value that marks the object (of colours: red * 65536 + green * 256 + blue). threshold: pixels of at
    least this grey level are the object. With neither, the file must have one value besides 0. Raises FileFault.
    """
    image = decode_file(read_file_below(root, name, links))
    if image.format == "JPEG" and value is None and threshold is None:
        raise FileFault("it is a JPEG, whose pixel values are not exact; save masks as PNG, or give --mask_threshold")
    if threshold is not None:
        grey = image if image.mode in _INDICES else image.convert("L")
        return (np.asarray(grey).astype(np.int64) >= threshold).astype(np.uint8)
    pixels = pixel_values(image)
    if value is not None:
        return (pixels == value).astype(np.uint8)
    levels = np.unique(pixels[pixels != 0])
    if len(levels) > 1:
        listed = ", ".join(map(str, levels[:5].tolist())) + (", ..." if len(levels) > 5 else "")
        raise FileFault(f"its pixels have the values {listed} beside 0; give --mask_threshold, or a column mask_value")
    return (pixels != 0).astype(np.uint8)


_INDICES = ("1", "L", "P", "I", "I;16", "I;16B", "F")


def pixel_values(image: Image.Image) -> NDArray[np.int64]:
    """One whole number per pixel, [h, w]: palette index, grey level, or red * 65536 + green * 256 + blue.

    An alpha channel hides what it makes transparent; a picture that is equal in its three colours counts as grey.
    """
    if image.mode in _INDICES:
        return np.asarray(image).astype(np.int64)
    rgba = np.asarray(image.convert("RGBA")).astype(np.int64)
    red, green, blue, alpha = (rgba[..., channel] for channel in range(4))
    grey = bool(((red == green) & (green == blue)).all())
    values = red if grey else (red << 16) + (green << 8) + blue
    if bool((alpha == 0).any()) and not values[alpha > 0].any():
        return (alpha > 0).astype(np.int64)  # drawn in the alpha channel alone
    return np.where(alpha > 0, values, 0)


def decode_file(content: bytes) -> Image.Image:
    """Decode an image file of at most MAX_PIXELS. Raises FileFault."""
    try:
        image = Image.open(io.BytesIO(content))
        if image.width * image.height > MAX_PIXELS:
            raise FileFault(f"it has {image.width} x {image.height} pixels, more than {MAX_PIXELS:,}")
        image.load()
    except FileFault:
        raise
    except Exception as error:  # Pillow's plugins raise almost anything for a damaged file
        raise FileFault(f"the file is damaged ({first_line(error).split(' <')[0]})") from error
    return image
