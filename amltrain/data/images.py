"""Decode images, and turn images of any mode into RGB of 8 bits per channel."""

import io
from typing import Literal

import numpy as np
import torch
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
