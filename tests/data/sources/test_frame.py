"""The frame of a picture and the forms of a mask: read rightly, or rejected with the true reason."""

import io
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image, ImageOps

from amltrain.data.images import EXIF_ORIENTATION, FileFault, pixel_values
from amltrain.data.segmentation import BrokenSegmentationError, decode_mask, encode_mask, referent_mask
from amltrain.data.sources.frame import (
    SCALED,
    STORED,
    STRETCHED,
    UPRIGHT,
    Frame,
    FrameRule,
    establish,
    fit_bitmap,
    in_frame,
    same_proportions,
    upright_content,
)
from amltrain.data.sources.mask_forms import canonical
from tests.data.sources.writers import Mask, png_text, runs_of

ASK = FrameRule()
SIDES = st.integers(1, 400)


@pytest.mark.parametrize(
    ("stored", "turn", "stated", "rule", "frame", "noticed"),
    [
        ((48, 64), 1, None, ASK, (48, 64), ()),
        ((48, 64), 1, (48, 64), ASK, (48, 64), ()),
        ((48, 64), 6, (64, 48), ASK, (64, 48), (UPRIGHT,)),
        ((48, 64), 6, (48, 64), ASK, (48, 64), (STORED,)),
        ((48, 64), 6, None, FrameRule("upright"), (64, 48), (UPRIGHT,)),
        ((48, 64), 6, None, FrameRule("stored"), (48, 64), (STORED,)),
        ((48, 64), 3, (48, 64), FrameRule("upright"), (48, 64), (UPRIGHT,)),
        ((48, 64), 1, (96, 128), ASK, (48, 64), (SCALED,)),
        ((48, 64), 6, (128, 96), ASK, (64, 48), (UPRIGHT, SCALED)),
        ((801, 800), 1, (800, 800), ASK, (801, 800), (SCALED,)),
        ((787, 800), 1, (800, 800), FrameRule("stored", True), (787, 800), (STRETCHED,)),
    ],
)
def test_sizes_decide(stored: Any, turn: int, stated: Any, rule: FrameRule, frame: Any, noticed: Any) -> None:
    found = establish(stored, turn, stated, rule)
    assert (found.height, found.width) == frame
    assert set(found.noticed) == set(noticed)


@pytest.mark.parametrize(
    ("stored", "turn", "stated", "message"),
    [
        ((48, 64), 6, None, r"\(orientation 6\), and no size tells .*--exif upright .* or --exif stored"),
        ((48, 64), 3, (48, 64), r"\(orientation 3\), and no size tells"),
        ((64, 64), 8, (64, 64), r"\(orientation 8\), and no size tells"),
        ((48, 64), 1, (64, 48), "48 x 64 pixels, its annotations say 64 x 48; height and width are exchanged"),
        ((48, 64), 1, (48, 80), "its annotations say 48 x 80; is it another picture"),
        ((787, 800), 1, (800, 800), "its annotations say 800 x 800"),
    ],
)
def test_what_no_size_decides_is_a_question(stored: Any, turn: int, stated: Any, message: str) -> None:
    with pytest.raises(FileFault, match=message):
        establish(stored, turn, stated, ASK)


@given(height=SIDES, width=SIDES, factor=st.floats(0.2, 5))
def test_a_resized_picture_keeps_its_proportions(height: int, width: int, factor: float) -> None:
    resized = (max(1, round(height * factor)), max(1, round(width * factor)))
    assert same_proportions((height, width), resized)
    assert same_proportions(resized, (height, width))
    if min(height, width) > 20:  # below, a pixel of rounding is a large share
        assert not same_proportions((height, width), (height, 2 * width))


@pytest.mark.parametrize("turn", range(2, 9))
def test_a_picture_is_written_upright_as_viewers_show_it(turn: int) -> None:
    pixels = np.random.default_rng(turn).integers(0, 255, (5, 7, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = turn
    written = io.BytesIO()
    Image.fromarray(pixels).save(written, "PNG", exif=exif.tobytes())
    upright = Image.open(io.BytesIO(upright_content(written.getvalue())))
    assert upright.getexif().get(EXIF_ORIENTATION, 1) == 1
    shown = ImageOps.exif_transpose(Image.open(io.BytesIO(written.getvalue())))
    assert np.array_equal(np.asarray(upright), np.asarray(shown))


MASKS = arrays(np.uint8, st.tuples(st.integers(2, 20), st.integers(3, 20)), elements=st.integers(0, 1)).filter(np.any)


def back(form: Any, mask: Mask) -> Mask:
    fitted, _ = in_frame(form, Frame(*mask.shape))
    return decode_mask(referent_mask([fitted], *mask.shape).union)


@settings(max_examples=60, deadline=None)
@given(mask=MASKS)
def test_every_exact_form_gives_the_same_mask(mask: Mask) -> None:
    rle = encode_mask(mask)
    runs = runs_of(mask.T.reshape(-1))
    forms = [
        rle,
        {"size": list(mask.shape), "counts": runs},
        {"size": [float(side) for side in mask.shape], "counts": [float(run) for run in runs]},
        {"size": np.array(mask.shape), "counts": np.array(runs)},
        {"size": list(mask.shape), "counts": rle["counts"].encode()},
        {"size": list(mask.shape), "counts": str(rle["counts"].encode())},
        {"height": mask.shape[0], "width": mask.shape[1], "counts": runs},
        [rle],
        mask.tolist(),
        (mask * 255).tolist(),
        mask.astype(bool).tolist(),
        mask,
        mask[None],
        mask[..., None].tolist(),
        png_text(mask),
        f"data:image/png;base64,{png_text(mask)}",
    ]
    for form in forms:
        assert np.array_equal(back(form, mask), mask), form


POINTS = st.lists(st.tuples(st.integers(0, 40), st.integers(0, 30)), min_size=3, max_size=6)


@settings(max_examples=60, deadline=None)
@given(polygons=st.lists(POINTS, min_size=1, max_size=3))
def test_every_form_of_polygons_is_the_same(polygons: list[list[tuple[int, int]]]) -> None:
    flat = [[float(c) for point in polygon for c in point] for polygon in polygons]
    listed = [[[float(x), float(y)] for x, y in polygon] for polygon in polygons]
    for form in (
        flat,
        listed,
        [[{"x": x, "y": y} for x, y in polygon] for polygon in listed],
        [[polygon] for polygon in listed],
        [[polygon] for polygon in flat],
        tuple(tuple(polygon) for polygon in flat),
        *((flat[0], listed[0]) if len(flat) == 1 else ()),
    ):
        assert canonical(form, (31, 41)) == flat, form


def test_a_bitmap_is_told_from_polygons() -> None:
    polygons = [[0, 0, 255, 0, 255, 255, 0, 255], [0, 0, 255, 0, 0, 255, 255, 255]]
    assert canonical(polygons, (300, 300)) == polygons
    bitmap = canonical(polygons, (2, 8))
    assert decode_mask(bitmap).tolist() == [[int(v > 0) for v in row] for row in polygons]


@pytest.mark.parametrize(
    ("form", "message"),
    [
        ([[0, 1, 1], [1, 0, 1]], "looks like a bitmap of 2 x 3 pixels, the picture has 48 x 64"),
        ([["1", "2"], ["3", "4"]], "coordinates are texts"),
        ([["8", "8", "24", "8", "24", "24"]], "coordinates are texts"),
        ("1 3 10 5", "looks like run lengths of pairs"),
        ("POLYGON ((1 1, 2 2, 3 1))", "it is WKT"),
        ("mask one", "neither a mask file nor JSON"),
        ("iVBORnot base64!", "base64 text is damaged"),
        ({"type": "Polygon", "coordinates": []}, "it is a GeoJSON geometry"),
        ({"data": "eJz", "origin": [1, 2]}, "an object with the keys data, origin, not run lengths"),
        ([{"size": [2, 2], "counts": [4]}, [1, 2, 3, 4, 5, 6]], "mixes run lengths and polygons"),
        ([[[1, 2, 3], [4, 5, 6]]], "a polygon has an odd number|a point that is not|fewer than 3"),
        ({"size": [64, 48], "counts": [64 * 48]}, r"its mask is for size \[64, 48\].*exchanged"),
        ({"size": [50, 64], "counts": [50 * 64]}, r"its mask is for size \[50, 64\], the picture is \[48, 64\]"),
        ({"counts": [4]}, "run lengths are for size None"),
        ([[True, False], [True]], "not equally long"),
        ({}, "an object with the keys , not run lengths"),
        (7, "no polygon and no run lengths"),
    ],
)
def test_other_forms_are_rejected_by_their_true_reason(form: Any, message: str) -> None:
    with pytest.raises(BrokenSegmentationError, match=message):
        referent_mask([in_frame(form, Frame(48, 64))[0]], 48, 64)


@settings(max_examples=40, deadline=None)
@given(mask=MASKS, factor=st.integers(2, 4))
def test_a_mask_at_another_scale_is_the_same_mask(mask: Mask, factor: int) -> None:
    large = mask.repeat(factor, 0).repeat(factor, 1)
    assert np.array_equal(fit_bitmap(mask, Frame(*large.shape)), large)
    assert np.array_equal(fit_bitmap(large, Frame(*mask.shape)), mask)


def test_coordinates_at_another_scale_are_scaled() -> None:
    frame = establish((24, 32), 1, (48, 64), ASK)
    fitted, _ = in_frame([[8, 8, 24, 8, 24, 24, 8, 24]], frame)
    assert fitted == [[4, 4, 12, 4, 12, 12, 4, 12]]


@pytest.mark.parametrize(
    ("mode", "pixel", "value"),
    [
        ("1", 1, 1),
        ("L", 200, 200),
        ("P", 3, 3),
        ("I;16", 40_000, 40_000),
        ("RGB", (9, 9, 9), 9),
        ("RGB", (1, 2, 3), 66_051),
        ("RGBA", (5, 5, 5, 255), 5),
        ("RGBA", (0, 0, 0, 255), 1),
        ("LA", (7, 255), 7),
    ],
)
def test_a_mask_file_of_any_mode(mode: str, pixel: Any, value: int) -> None:
    image = Image.new(mode, (4, 3))
    image.putpixel((2, 1), pixel)
    found = pixel_values(image)
    assert found[1, 2] == value
    assert found.sum() == value
