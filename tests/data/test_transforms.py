"""Images and masks as the releases' own preprocessing makes them, and a geometry that leads back."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import load_file

from amltrain.data.transforms import ImageTransform


def random_image(height: int, width: int, seed: int = 0) -> Image.Image:
    small = np.random.default_rng(seed).integers(0, 256, (height // 4 + 1, width // 4 + 1, 3), np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def blob(height: int, width: int) -> np.ndarray:
    rows, columns = np.mgrid[:height, :width]
    inside = ((rows - height * 0.4) / (height * 0.25)) ** 2 + ((columns - width * 0.6) / (width * 0.3)) ** 2 < 1
    return inside.astype(np.uint8)


@pytest.mark.parametrize("release", ["cris", "etris", "detris"])
@pytest.mark.parametrize(("case", "size"), [("a", 104), ("b", 112)])
def test_letterbox_is_the_releases_warp(shared_dir: Path, release: str, case: str, size: int) -> None:
    """OpenCV rounds its cubic weights to 15 bits: now and then a pixel differs by one grey level."""
    recorded = load_file(shared_dir / "goldens" / release / "preproc.safetensors")
    mask = (recorded[f"{case}.mask"] > 0).astype(np.uint8)
    result = ImageTransform(size, "letterbox", "clip")(Image.fromarray(recorded[f"{case}.image_rgb"]), mask)
    expected = recorded[f"{case}.input_tensor"].reshape(result.image.shape)
    greys = (
        np.abs(result.image.numpy() - expected) * 255 * np.array([0.26862954, 0.26130258, 0.27577711])[:, None, None]
    )
    assert greys.max() < 1.1
    assert (greys > 0.01).mean() < 1e-3
    assert np.abs(result.target.numpy() / 255 - recorded[f"{case}.warped_mask"]).max() < 1e-6
    _, _, scale_y, scale_x, offset_y, offset_x = result.geometry.tolist()
    affine = np.array([[scale_x, 0, offset_x - 0.5 * (1 - scale_x)], [0, scale_y, offset_y - 0.5 * (1 - scale_y)]])
    np.testing.assert_allclose(affine, recorded[f"{case}.M"].reshape(2, 3), atol=1e-4)


def test_square_is_pils_bilinear_and_nearest() -> None:
    image, mask = random_image(90, 130), blob(90, 130)
    result = ImageTransform(64, "square", "imagenet")(image, mask)
    resized = np.asarray(image.resize((64, 64), Image.Resampling.BILINEAR), np.float64).transpose(2, 0, 1) / 255
    mean, std = (np.array(v)[:, None, None] for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    np.testing.assert_allclose(result.image.numpy(), (resized - mean) / std, atol=1e-5)
    nearest = Image.fromarray(mask).resize((64, 64), Image.Resampling.NEAREST)
    assert np.array_equal(result.target.numpy(), np.asarray(nearest) * 255)
    assert result.geometry.tolist() == [90, 130, 64 / 90, 64 / 130, 0, 0]


@pytest.mark.parametrize("resize", ["square", "letterbox"])
@pytest.mark.parametrize("shape", [(90, 130), (130, 90), (20, 31), (64, 64)])
def test_the_geometry_maps_the_original_mask_onto_the_target(resize: str, shape: tuple[int, int]) -> None:
    mask = blob(*shape)
    result = ImageTransform(64, resize)(random_image(*shape), mask)
    height, width, scale_y, scale_x, offset_y, offset_x = result.geometry.tolist()
    assert (height, width) == shape

    def centre(weights: np.ndarray) -> np.ndarray:
        rows, columns = np.mgrid[: weights.shape[0], : weights.shape[1]] + 0.5
        return np.array([(weights * rows).sum(), (weights * columns).sum()]) / weights.sum()

    found = centre(result.target.numpy().astype(float))
    expected = centre(mask.astype(float)) * (scale_y, scale_x) + (offset_y, offset_x)
    np.testing.assert_allclose(found, expected, atol=0.3)


def test_letterbox_pads_with_the_mean_colour_and_no_mask() -> None:
    result = ImageTransform(64, "letterbox", "clip")(Image.new("RGB", (80, 40), "red"), np.ones((40, 80), np.uint8))
    assert result.image[:, :10].abs().max() < 0.01  # the mean, to the nearest grey level
    assert result.target[:10].max() == 0
    assert result.target[30, 30] == 255


@pytest.mark.parametrize("normalization", ["imagenet", "clip", "half"])
def test_a_picture_can_be_had_back(normalization: str) -> None:
    image = random_image(64, 64)
    transform = ImageTransform(64, "square", normalization)
    assert np.array_equal(transform.denormalise(transform(image).image), np.asarray(image))


@pytest.mark.parametrize("mode", ["L", "CMYK", "P", "RGBA", "1"])
@pytest.mark.parametrize("resize", ["square", "letterbox"])
def test_any_image_mode_is_read_as_rgb(mode: str, resize: str) -> None:
    image = random_image(40, 50).convert(mode)
    result = ImageTransform(32, resize)(image)
    assert result.target is None
    assert result.image.shape == (3, 32, 32) and result.image.dtype == torch.float32
    assert torch.equal(result.image, ImageTransform(32, resize)(image.convert("RGB")).image)


def test_an_image_of_16_bits_is_the_one_of_8() -> None:
    grey = np.random.default_rng(0).integers(0, 256, (40, 60)).astype(np.uint8)
    deep = Image.fromarray(grey.astype(np.uint16) * np.uint16(257))
    transform = ImageTransform(32)
    assert torch.equal(transform(deep).image, transform(Image.fromarray(grey)).image)
