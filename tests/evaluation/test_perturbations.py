"""Each perturbation does what its line in the table says, and the same one every time."""

import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from amltrain.errors import UserError
from amltrain.evaluation.perturbations import PERTURBATIONS, build_perturbation
from amltrain.evaluation.results import presets


@pytest.fixture(scope="module")
def image() -> Image.Image:
    ramp = np.linspace(20, 200, 100 * 150 * 3).reshape(100, 150, 3)
    return Image.fromarray(ramp.astype(np.uint8))


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image, dtype=int)


@pytest.mark.parametrize("name", sorted(PERTURBATIONS))
def test_a_function_of_seed_and_sample_alone(image: Image.Image, name: str):
    before = image.tobytes()
    first = build_perturbation(name, seed=3)(image, 7)
    build_perturbation(name, seed=3)(image, 8)
    assert first.tobytes() == build_perturbation(name, seed=3)(image, 7).tobytes()
    assert first.size == image.size
    assert first.tobytes() != before
    assert image.tobytes() == before


@pytest.mark.parametrize("name", ["occlusion", "patches", "jitter", "occluded"])
def test_random_ones_differ_between_samples_and_seeds(image: Image.Image, name: str):
    results = {build_perturbation(name, seed=s)(image, i).tobytes() for s in (0, 1) for i in (0, 1)}
    assert len(results) == 4


@pytest.mark.parametrize("name", sorted(PERTURBATIONS))
def test_severity_zero_changes_nothing(image: Image.Image, name: str):
    assert build_perturbation(name, severity=0)(image, 7).tobytes() == image.tobytes()


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [("haze", 100, 178), ("highlight", 100, 180), ("highlight", 200, 255), ("low_light", 100, 40)],
)
def test_values_of_a_flat_image(name: str, value: int, expected: int):
    flat = Image.new("RGB", (8, 8), (value,) * 3)
    assert (pixels(build_perturbation(name)(flat, 0)) == expected).all()


def test_contrast_doubles_the_distance_to_the_mean():
    halves = np.full((4, 8, 3), 100, np.uint8)
    halves[:, 4:] = 140
    changed = pixels(build_perturbation("contrast")(Image.fromarray(halves), 0))
    assert (changed[:, :4] == 80).all()
    assert (changed[:, 4:] == 160).all()


def test_occlusion_is_one_grey_square():
    image = Image.new("RGB", (150, 100), (10, 200, 30))
    rows, columns = np.nonzero((pixels(build_perturbation("occlusion")(image, 1)) == 128).all(2))
    assert np.ptp(rows) + 1 == np.ptp(columns) + 1 == 40  # 0.4 of the short side
    assert len(rows) == 40 * 40


def test_patches_are_black_and_at_most_three_large_ones(image: Image.Image):
    black = (pixels(build_perturbation("patches")(image, 1)) == 0).all(2)
    assert 0.01 <= black.mean() <= 3 * 0.3**2


@pytest.mark.parametrize("share", [0.3, 0.5])
def test_occluded_share(share: float):
    image = Image.new("RGB", (320, 320), (10, 200, 30))
    changed = (pixels(build_perturbation("occluded", share)(image, 4)) == 128).all(2)
    assert changed.mean() == pytest.approx(share, abs=0.005)


def test_bad_names_and_severities():
    with pytest.raises(UserError, match="did you mean haze"):
        build_perturbation("hase")
    with pytest.raises(UserError, match=r"severity 1.5 of occluded must lie between 0 and 1\.0"):
        build_perturbation("occluded", 1.5)


def test_the_page_on_evaluation_names_everything(repository: Path):
    page = (repository / "docs" / "evaluation.md").read_text()
    missing = [name for name in (*PERTURBATIONS, *presets()) if not re.search(rf"\b{name}\b", page)]
    assert not missing
