"""Images of every depth become the RGB that the same scene of 8 bits would be."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from amltrain.data.images import decode_image, to_rgb
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


def test_what_does_not_say_where_white_is_gets_rejected() -> None:
    with pytest.raises(UserError, match=r"depth\.tif has float pixels.*save it as an 8- or 16-bit PNG"):
        to_rgb(Image.fromarray(GREY.astype(np.float32)), "depth.tif")
    for beyond in (GREY.astype(np.int32) - 300, GREY.astype(np.int32) << 12):
        with pytest.raises(UserError, match=r"the image has pixels from .* beyond 16 bits"):
            to_rgb(Image.fromarray(beyond))


def encoded(image: Image.Image, kind: str = "JPEG", **options: object) -> bytes:
    content = io.BytesIO()
    image.save(content, kind, **options)
    return content.getvalue()


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_torchvision_decodes_jpegs_to_the_pixels_of_pillow(mode: str) -> None:
    content = encoded(Image.fromarray(GREY).convert(mode))
    pixels = decode_image(content, "x", (40, 60), "torchvision")
    assert isinstance(pixels, torch.Tensor) and pixels.dtype == torch.uint8
    assert np.array_equal(pixels.permute(1, 2, 0).numpy(), np.asarray(decode_image(content, "x", (40, 60))))


@pytest.mark.parametrize(("mode", "kind"), [("CMYK", "JPEG"), ("RGBA", "PNG"), ("L", "PNG"), ("P", "GIF")])
def test_other_files_are_left_to_pillow(mode: str, kind: str) -> None:
    content = encoded(Image.fromarray(GREY).convert(mode), kind)
    image = decode_image(content, "x", (40, 60), "torchvision")
    assert isinstance(image, Image.Image) and image.mode == "RGB"


@pytest.mark.parametrize("decoder", ["pil", "torchvision"])
def test_a_cut_off_file_is_named(decoder: str) -> None:
    content = encoded(Image.fromarray(GREY))
    with pytest.raises(UserError, match="row 3 cannot be decoded"):
        decode_image(content[: len(content) // 2], "row 3", (40, 60), decoder)


@pytest.mark.parametrize("decoder", ["pil", "torchvision"])
def test_an_image_is_turned_by_its_exif_tag_where_the_masks_were_drawn_on_it_upright(decoder: str) -> None:
    image = Image.fromarray(GREY).convert("RGB")  # stored 40 x 60
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees to view
    content = encoded(image, exif=exif, quality=95)
    stored = decode_image(content, "x", (40, 60), decoder)
    upright = decode_image(content, "x", (60, 40), decoder)
    stored = stored.permute(1, 2, 0).numpy() if isinstance(stored, torch.Tensor) else np.asarray(stored)
    assert np.array_equal(np.asarray(upright), np.rot90(stored, -1))
