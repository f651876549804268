"""Files, folders and patterns become a list of images."""

from pathlib import Path

import pytest
from PIL import Image

from amltrain.errors import UserError
from amltrain.inference.predict import find_images


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    for name in ("b.png", "a.JPG", "deep/c.png", "odd.xyz"):
        path = tmp_path / "photos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4)).save(path, format="PNG")
    (tmp_path / "photos" / "notes.txt").write_text("not an image")
    return tmp_path / "photos"


def names(photos: Path, *sources: str) -> list[str]:
    return [str(Path(p).relative_to(photos)) for p in find_images([str(photos / s) for s in sources])]


def test_files_folders_and_patterns(photos: Path) -> None:
    assert names(photos, "") == ["a.JPG", "b.png"]
    assert names(photos, "*.png") == ["b.png"]
    assert names(photos, "**/*") == ["a.JPG", "b.png", "deep/c.png"]
    assert names(photos, "odd.xyz", "b.png", "") == ["odd.xyz", "b.png", "a.JPG"]


def test_a_name_with_brackets_is_a_file(photos: Path) -> None:
    (photos / "b.png").rename(photos / "b[1].png")
    assert names(photos, "b[1].png") == ["b[1].png"]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("https://example.org/a.jpg", "is a URL"),
        ("none.jpg", "there is no image"),
        ("*.gif", "no image matches"),
        ("empty", "there is no image in the folder"),
    ],
)
def test_a_source_that_names_nothing(photos: Path, source: str, message: str) -> None:
    (photos / "empty").mkdir()
    with pytest.raises(UserError, match=message):
        find_images([source if "://" in source else str(photos / source)])
