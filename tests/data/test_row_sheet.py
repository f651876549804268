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


def test_samples_are_drawn_before_and_after_augmentations(prepared: str, tmp_path: Path) -> None:
    from amltrain.commands.look import EPOCHS, main

    names = ["--dataset", "refshapes", "--prepared", prepared, "--rows", "2"]
    main([*names, "--augment", "flip", "scale_jitter", "negatives", "--output", str(tmp_path / "a.png")])
    main([*names, "--output", str(tmp_path / "b.png")])
    augmented, plain = Image.open(tmp_path / "a.png"), Image.open(tmp_path / "b.png")
    assert augmented.width == plain.width and augmented.height > plain.height and EPOCHS == 3
    tile = (8, 8, 8 + 260, 8 + 260)
    assert augmented.crop(tile).tobytes() == plain.crop(tile).tobytes()  # the first is the sample as it is
    with pytest.raises(SystemExit):
        main([*names, "--output", str(tmp_path / "a.unknown")])


def test_a_turned_photograph_is_shown_upright() -> None:
    import io

    from amltrain.data.row_sheet import _Shown, _tile
    from amltrain.data.segmentation import encode_mask
    from amltrain.data.sources.annotations import ImageGroup

    upright = np.zeros((60, 30, 3), np.uint8)
    upright[:30] = (250, 0, 0)
    exif = Image.Exif()
    exif[0x0112] = 6
    content = io.BytesIO()
    Image.fromarray(upright).transpose(Image.Transpose.ROTATE_90).save(content, "PNG", exif=exif.tobytes())
    mask = np.ones((60, 30), np.uint8)
    sentence = {"raw": "x", "sent": "x", "sent_id": 1}
    referent = {"no_target": False, "mask": encode_mask(mask), "category": "", "ref_id": 1, "sentences": [sentence]}
    group = ImageGroup(1, "a.png", 60, 30, [referent], content.getvalue(), [], [])
    shown = np.asarray(_tile(_Shown("0" * 64, "train", group)))
    assert shown[50, 60, 0] > 200 and shown[200, 60, 0] < 40
