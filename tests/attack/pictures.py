# ruff: noqa: E501 - a case a line
"""Images that are bombs, damaged, odd or not images, and paths that lead outside."""

import io
import os
import struct
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from amltrain.data.images import FileFault, decode_image, read_file_below, read_image_file, read_mask_file
from amltrain.errors import UserError
from amltrain.inference.predictor import read_image
from tests.attack.cases import Case, Place


def encoded(kind: str, mode: str = "RGB", size: tuple[int, int] = (40, 30), **options: Any) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.arange(size[0] * size[1] * 3, dtype=np.uint8).reshape(size[1], size[0], 3)).convert(mode).save(
        file, kind, **options
    )
    return file.getvalue()


def png(width: int, height: int, depth: int = 8, colour: int = 2, data: bytes = b"") -> bytes:
    """A PNG with these numbers in its header, whatever its data."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")


JPEG, PNG = encoded("JPEG"), encoded("PNG")
EXIF = Image.Exif()
EXIF[0x0112] = 99
REJECTED: dict[str, bytes] = {
    "nothing": b"",
    "text": b"<html>404</html>",
    "PNG of 60,000 x 60,000": png(60_000, 60_000),
    "PNG of 2^31 x 2^31": png(2**31 - 1, 2**31 - 1),
    "PNG of no width": png(0, 30),
    "PNG of depth 3": png(40, 30, depth=3),
    "PNG of colour 9": png(40, 30, colour=9),
    "PNG without data": png(40, 30),
    "PNG of 14,000 x 14,000, compressed zeros": png(14_000, 14_000, 1, 0, bytes(1751 * 14_000)),
    "PPM of 60,000 x 60,000": b"P6 60000 60000 255\n" + bytes(100),
    "PPM of -1": b"P6 -1 -1 255\n" + bytes(100),
    "PPM of 10^30": b"P6 " + b"9" * 30 + b" 1 255\n",
    "PPM with depth 10^9": b"P6 4 3 1000000000\n" + bytes(100),
    "PGM text with letters": b"P2 4 3 255\n a b c",
    "BMP of 2^31": b"BM" + bytes(12) + struct.pack("<IiiHHIIiiII", 40, 2**31 - 1, 2**31 - 1, 1, 24, 0, 0, 0, 0, 0, 0),
    "GIF header alone": b"GIF89a" + struct.pack("<HHBBB", 65535, 65535, 0, 0, 0),
    "TIFF in a circle": b"II*\0\x08\0\0\0\0\0\x08\0\0\0",
    "TIFF of floats": encoded("TIFF", "F"),
    "ICO of nothing": b"\0\0\1\0\1\0" + bytes(16),
    "WebP header alone": b"RIFF\xff\xff\xff\xffWEBPVP8 ",
    "PSD header": b"8BPS\0\1" + bytes(30),
    "EPS": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 99999 99999\n",
    "JPEG without an end": JPEG[:300],
    "JPEG header alone": JPEG[:20],
    "JPEG of 65,535 x 65,535": JPEG.replace(struct.pack(">HH", 30, 40), struct.pack(">HH", 65535, 65535), 1),
}
ODD: dict[str, bytes] = {
    "JPEG in CMYK": encoded("JPEG", "CMYK"),
    "JPEG in grey": encoded("JPEG", "L"),
    "PNG with a palette": encoded("PNG", "P"),
    "PNG of one bit": encoded("PNG", "1"),
    "PNG of 16 bits": encoded("PNG", "I;16"),
    "PNG with alpha": encoded("PNG", "RGBA"),
    "JPEG with orientation 99": encoded("JPEG", exif=EXIF.tobytes()),
    "JPEG with a broken EXIF": encoded("JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff"),
    "JPEG with letters after it": JPEG + b"x" * 1000,
    "animated GIF": encoded("GIF", save_all=True, append_images=[Image.new("RGB", (40, 30))]),
    "PNG with a long text": encoded("PNG", pnginfo=None) + b"\0" * 100,
}


def _with(read: Callable[[Path], Any], content: bytes) -> Callable[[Place], Any]:
    def attack(place: Place) -> Any:
        path = place.folder.resolve() / "image.jpg"
        path.write_bytes(content)
        return read(path)

    return attack


def _prepare_reader(path: Path) -> Any:
    return rejected(lambda: read_image_file(path.parent, path.name))


def _mask_reader(path: Path) -> Any:
    return rejected(lambda: read_mask_file(path.parent, path.name, value=1))


def rejected(read: Callable[[], Any]) -> Any:
    """A FileFault, which is counted, as the error that ends a command where too many are."""
    try:
        return read()
    except FileFault as fault:
        raise UserError(str(fault)) from fault


READERS: dict[str, Callable[[Path], Any]] = {
    "prepare": _prepare_reader,
    "mask": _mask_reader,
    "predict": read_image,
    "train": lambda path: decode_image(path.read_bytes(), "it", (30, 40)),
    "train with torchvision": lambda path: decode_image(path.read_bytes(), "it", (30, 40), "torchvision"),
}
READ = {("TIFF of floats", "mask")}
PATHS = (
    "../secret", "/etc/passwd", "a/../../secret", "..\\secret", "C:\\x.jpg", "//host/share/x.jpg", "", ".", "..", "a\0b",
    "x" * 5000, "x/" * 3000, "\ud800.jpg", "~/x.jpg", "link", "linked/secret", "circle", "pipe", "folder", "/dev/zero",
    "/proc/self/mem", "device",
)  # fmt: skip


def _path(name: str) -> Callable[[Place], Any]:
    def attack(place: Place) -> Any:
        root = (place.folder / "images").resolve()
        root.mkdir()
        (root / "link").symlink_to(place.secret)
        (root / "linked").symlink_to(place.secret.parent)
        (root / "circle").symlink_to(root / "circle")
        (root / "device").symlink_to("/dev/zero")
        (root / "folder").mkdir()
        os.mkfifo(root / "pipe")
        return rejected(lambda: read_file_below(root, name))

    return attack


def cases() -> Iterator[Case]:
    for reader, read in READERS.items():
        for name, content in REJECTED.items():
            expected = "decided" if name.startswith("PNG of 14,000") or (name, reader) in READ else "rejected"
            yield Case("images", f"{name}, {reader}", expected, _with(read, content))
        for name, content in ODD.items():
            expected = "decided" if reader == "mask" else "used"
            yield Case("images", f"{name}, {reader}", expected, _with(read, content))
    for name in PATHS:
        yield Case("paths", repr(name[:30]), "rejected", _path(name))
