"""The sheet of rows shows a mask on an object of any colour, and costs little."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from amltrain.data.row_sheet import LINE, ROWS, SIDE, RowSheet
from amltrain.data.segmentation import encode_mask
from amltrain.data.sources.annotations import ImageGroup


def group(number: int, colour: str, *, no_target: bool = False) -> ImageGroup:
    content = io.BytesIO()
    Image.new("RGB", (400, 300), colour).save(content, "PNG")
    mask = np.zeros((300, 400), np.uint8)
    mask[100:200, 100:200] = not no_target
    sentences = [{"sent_id": 0, "sent": "it", "raw": "It"}]
    referent = {"mask": encode_mask(mask), "no_target": no_target, "category": "", "ref_id": 1, "sentences": sentences}
    return ImageGroup(number, f"{number}.png", 300, 400, [referent], content.getvalue(), [], [])


def pixels(tmp_path: Path, *groups: ImageGroup) -> np.ndarray:
    sheet = RowSheet()
    for offered in groups:
        sheet.offer("train", offered)
    sheet.save(tmp_path / "rows.jpg")
    return np.asarray(Image.open(tmp_path / "rows.jpg").convert("RGB"), int)


@pytest.mark.parametrize("colour", ["red", "white", "black", "grey"])
def test_an_outline_is_seen_on_every_colour(colour: str, tmp_path: Path) -> None:
    tile = pixels(tmp_path, group(0, colour))[8 : 8 + 195, 8 : 8 + SIDE]
    row = tile[97].mean(axis=1)  # through the middle of the mask, columns 65 to 130
    assert np.ptp(row[62:70]) > 150 and np.ptp(row[126:134]) > 150
    assert np.ptp(row[75:120]) < 10  # the object itself is as it was


def test_nothing_is_outlined_where_there_is_nothing(tmp_path: Path) -> None:
    tile = pixels(tmp_path, group(0, "grey", no_target=True))[8 : 8 + 195, 8 : 8 + SIDE]
    assert np.ptp(tile) < 30  # a JPEG is not exact


def test_the_rows_are_chosen_by_their_names_alone(tmp_path: Path) -> None:
    many = [group(number, ("red", "blue", "green")[number % 3]) for number in range(3 * ROWS)]
    assert np.array_equal(pixels(tmp_path, *many), pixels(tmp_path, *many[::-1]))


def test_a_name_of_any_length_is_drawn_in_a_short_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[str] = []
    monkeypatch.setattr(ImageDraw.ImageDraw, "multiline_text", lambda self, place, text, **_: drawn.append(text))
    long = group(0, "red")
    long.referents[0]["category"] = "x" * 100_000
    long.referents[0]["sentences"] = [{"sent_id": 0, "sent": "it", "raw": "y" * 10_000}]
    pixels(tmp_path, long)
    assert drawn and max(map(len, drawn[0].splitlines())) <= LINE
