"""Images and masks as the releases' own preprocessing makes them, and a geometry that leads back."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import load_file

from amltrain.data.transforms import MEAN_STD, ImageTransform, _source_positions, normalise, placement, resampling


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
    std = np.array([0.26862954, 0.26130258, 0.27577711])[:, None, None]
    greys = np.abs(normalise(result.image, "clip").numpy() - expected) * 255 * std
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
    np.testing.assert_allclose(normalise(result.image, "imagenet").numpy(), (resized - mean) / std, atol=1e-5)
    nearest = Image.fromarray(mask).resize((64, 64), Image.Resampling.NEAREST)
    assert np.array_equal(result.target.numpy(), np.asarray(nearest) * 255)
    assert result.geometry.tolist() == [90, 130, 64 / 90, 64 / 130, 0, 0]


@pytest.mark.parametrize("order", ["C", "F"])
def test_nearest_is_pillows_at_any_size(order: str) -> None:
    generator = np.random.default_rng(0)
    for height, width, size in generator.integers(1, 700, (60, 3)).tolist():
        mask = np.array(generator.random((height, width)) < 0.5, np.uint8, order=order)
        expected = Image.fromarray(mask * np.uint8(255)).resize((size, size), Image.Resampling.NEAREST)
        assert np.array_equal(ImageTransform(size).target(mask).numpy(), np.asarray(expected)), (height, width, size)


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
    assert result.image[:, 0, 0].tolist() == [123, 117, 104]  # the mean, to the nearest grey level
    assert (result.image[:, :10] == result.image[:, :1, :1]).all()
    assert result.target[:10].max() == 0
    assert result.target[30, 30] == 255


@pytest.mark.parametrize("normalization", ["imagenet", "clip", "half"])
def test_a_picture_can_be_had_back(normalization: str) -> None:
    image = random_image(64, 64)
    transform = ImageTransform(64, "square", normalization)
    pixels = transform(image).image
    assert np.array_equal(transform.denormalise(pixels), np.asarray(image))
    assert np.array_equal(transform.denormalise(normalise(pixels, normalization)), np.asarray(image))


@pytest.mark.parametrize("mode", ["L", "CMYK", "P", "RGBA", "1"])
@pytest.mark.parametrize("resize", ["square", "letterbox"])
def test_any_image_mode_is_read_as_rgb(mode: str, resize: str) -> None:
    image = random_image(40, 50).convert(mode)
    result = ImageTransform(32, resize)(image)
    assert result.target is None
    assert result.image.shape == (3, 32, 32) and result.image.dtype == torch.uint8
    assert torch.equal(result.image, ImageTransform(32, resize)(image.convert("RGB")).image)


def test_an_image_of_16_bits_is_the_one_of_8() -> None:
    grey = np.random.default_rng(0).integers(0, 256, (40, 60)).astype(np.uint8)
    deep = Image.fromarray(grey.astype(np.uint16) * np.uint16(257))
    transform = ImageTransform(32)
    assert torch.equal(transform(deep).image, transform(Image.fromarray(grey)).image)


@pytest.mark.parametrize("normalization", ["imagenet", "clip", "half"])
def test_normalising_on_the_device_gives_the_bits_of_normalising_in_the_loader(normalization: str) -> None:
    """The arithmetic of earlier versions, which normalised every sample with numpy."""
    pixels = ImageTransform(64, "square", normalization)(random_image(90, 130)).image
    mean, std = (np.array(values, np.float32) * 255 for values in MEAN_STD[normalization])
    channels = np.ascontiguousarray(pixels.numpy(), dtype=np.float32)
    channels -= mean[:, None, None]
    channels /= std[:, None, None]
    assert np.array_equal(normalise(pixels, normalization).numpy(), channels)
    assert torch.equal(normalise(torch.from_numpy(channels), normalization), torch.from_numpy(channels))


@pytest.mark.parametrize("size", [416, 448])
def test_letterbox_coordinates_are_rounded_twice_as_in_opencv(size: int) -> None:
    """OpenCV 4 rounds to 1/1024 pixel, then to 1/32; along x it rounds step and start of a row apart. One rounding
    gives another position for some image sizes at 448."""
    differ = 0
    for height, width in np.random.default_rng(0).integers(200, 700, (100, 2)).tolist():
        scale, _, shift = placement(height, width, size)
        step = width / (float(np.float32(shift + width * scale)) - float(np.float32(shift)))
        start = -float(np.float32(shift)) * step
        units = np.array([round(i * step * 1024) + round(start * 1024) for i in range(size)])
        assert np.array_equal(_source_positions(size, width, scale, shift, "x"), (units + 16) >> 5)
        once = np.floor((np.arange(size) - shift) / scale * 32 + 0.5)
        differ += not np.array_equal((units + 16) >> 5, once)
    assert (differ > 5) == (size == 448)  # 416 is a multiple of 32: one rounding is enough there


def test_letterbox_matrices_are_computed_once_per_size() -> None:
    resampling.cache_clear()
    transform = ImageTransform(64, "letterbox", "clip")
    for seed in range(3):
        transform(random_image(50, 80, seed), blob(50, 80))
    assert resampling.cache_info().misses == 4


@pytest.mark.parametrize("resize", ["square", "letterbox"])
def test_a_tensor_gives_the_pixels_of_a_pil_image(resize: str) -> None:
    image = random_image(90, 130)
    tensor = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    ours, theirs = (ImageTransform(64, resize)(given).image.int() for given in (tensor, image))
    assert (ours - theirs).abs().max() <= (1 if resize == "square" else 0)
