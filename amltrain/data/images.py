"""Images of any mode as RGB of 8 bits a channel; Pillow's own conversion turns what is above 255 white."""

import numpy as np
from PIL import Image

from amltrain.errors import UserError


def to_rgb(image: Image.Image, name: str = "the image") -> Image.Image:
    """An image as RGB. 16-bit grey keeps its upper 8 bits, as Pillow reads 16-bit colour.

    name: what to call the image in an error. Raises UserError for float pixels and for integers beyond 16 bits, which
    do not say what is white.
    """
    if image.mode == "F":
        raise UserError(f"{name} has float pixels, which do not say what is white; save it as an 8- or 16-bit PNG")
    if image.mode.startswith("I"):  # 32 bits, or I;16 in either byte order
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 65535:
            raise UserError(
                f"{name} has pixels from {values.min()} to {values.max()}, beyond 16 bits; "
                "save it as an 8- or 16-bit PNG"
            )
        image = Image.fromarray((values >> 8).astype(np.uint8))
    return image.convert("RGB")
