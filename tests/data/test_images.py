"""Images of every depth become the RGB that the same scene of 8 bits would be."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from amltrain.data.images import to_rgb
from amltrain.errors import UserError

GREY = np.random.default_rng(0).integers(0, 256, (40, 60)).astype(np.uint8)


@pytest.mark.parametrize("factor", [256, 257])  # a shift, or the full range
@pytest.mark.parametrize("file", ["deep.png", "deep.tif", "swapped.tif", "deep.pgm"])
def test_16_bits_are_scaled_to_8(tmp_path: Path, file: str, factor: int) -> None:
    deep = GREY.astype(np.uint16) * np.uint16(factor)
    if file == "deep.pgm":
        (tmp_path / file).write_bytes(b"P5 60 40 65535\n" + deep.astype(">u2").tobytes())
    else:
        Image.fromarray(deep.astype(">u2") if file == "swapped.tif" else deep).save(tmp_path / file)
    with Image.open(tmp_path / file) as image:
        assert image.mode in ("I", "I;16", "I;16B")
        assert np.array_equal(to_rgb(image), np.stack([GREY] * 3, 2))


@pytest.mark.parametrize("mode", ["L", "LA", "RGB", "RGBA", "P", "1", "CMYK"])
def test_8_bits_are_as_pillow_converts_them(mode: str) -> None:
    image = Image.fromarray(GREY).convert(mode)
    assert np.array_equal(to_rgb(image), image.convert("RGB"))


def test_what_does_not_say_where_white_is_gets_refused() -> None:
    with pytest.raises(UserError, match=r"depth\.tif has float pixels.*save it as an 8- or 16-bit PNG"):
        to_rgb(Image.fromarray(GREY.astype(np.float32)), "depth.tif")
    for beyond in (GREY.astype(np.int32) - 300, GREY.astype(np.int32) << 12):
        with pytest.raises(UserError, match=r"the image has pixels from .* beyond 16 bits"):
            to_rgb(Image.fromarray(beyond))
