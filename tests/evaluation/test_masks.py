"""Masks at network and original size; the letterbox's way back is compared with recorded OpenCV 4.8 output."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file

from amltrain.data.transforms import ImageTransform
from amltrain.evaluation.masks import network_probability, original_probability, referent_margin, to_original


def logit(p: torch.Tensor) -> torch.Tensor:
    return torch.logit(p.double()).float()


@pytest.mark.parametrize("release", ["cris", "etris", "detris"])
@pytest.mark.parametrize("case", ["a", "b"])
def test_letterbox_back_to_the_original_size(shared_dir: Path, release: str, case: str):
    recorded = load_file(shared_dir / f"goldens/{release}/preproc.safetensors")
    x = {k[2:]: v for k, v in recorded.items() if k.startswith(case + ".")}
    height, width = x["prob_at_original"].shape
    affine = x["M"]  # of pixel indices; our geometry is in continuous coordinates (index + 0.5)
    scale_x, scale_y = affine[0, 0].item(), affine[1, 1].item()
    geometry = [height, width, scale_y, scale_x]
    geometry += [affine[1, 2].item() + 0.5 * (1 - scale_y), affine[0, 2].item() + 0.5 * (1 - scale_x)]

    ours = to_original(x["prob_at_input"], geometry, "bicubic")
    assert (ours - x["prob_at_original"]).abs().max() < 1e-4
    mask, truth = ours > 0.35, x["mask"] > 0
    assert torch.equal(mask, x["pred"].bool())
    assert [(mask & truth).sum().item(), (mask | truth).sum().item()] == x["inter_union"].tolist()


def test_network_probability_is_the_softmax_of_upsampled_logits():
    logits = torch.randn(2, 2, 6, 7)
    expected = F.interpolate(logits, (24, 28), mode="bilinear", align_corners=True).softmax(1)[:, 1]
    torch.testing.assert_close(network_probability(logits, (24, 28)), expected)
    torch.testing.assert_close(network_probability(referent_margin(logits)[:, None], (24, 28)), expected)


def test_bicubic_interpolates_probabilities():
    logits = torch.randn(2, 1, 6, 6)
    expected = F.interpolate(logits.sigmoid(), (24, 24), mode="bicubic", align_corners=True)[:, 0]
    torch.testing.assert_close(network_probability(logits, (24, 24), "bicubic"), expected)


def test_half_precision_logits_are_interpolated_in_float32():
    logits = torch.randn(1, 2, 6, 6, dtype=torch.bfloat16)
    assert network_probability(logits, (12, 12)).dtype == torch.float32


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("side", [448, 480])
@pytest.mark.parametrize("shape", [(427, 640), (428, 640), (375, 500), (612, 612), (640, 457), (480, 640)])
def test_square_is_stretched_back(interpolation: str, side: int, shape: tuple[int, int]):
    """Every size by the releases' own rule, also where side / height * height is not the side in floating point."""
    height, width = shape
    geometry = ImageTransform(side, "square")(Image.new("RGB", (width, height))).geometry.tolist()
    logits = torch.randn(1, 1, 24, 24, generator=torch.Generator().manual_seed(0)) * 4
    [found] = original_probability(logits, (side, side), [geometry], interpolation)

    values = logits.sigmoid() if interpolation == "bicubic" else logits
    for size in ((side, side), (height, width)):
        values = F.interpolate(values, size, mode=interpolation, align_corners=True)
    torch.testing.assert_close(found, (values if interpolation == "bicubic" else values.sigmoid())[0, 0])


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_letterboxed_rectangle_comes_back_where_it_was(interpolation: str):
    truth = torch.zeros(40, 80)
    truth[10:30, 20:50] = 1
    scale, offset = 0.5, (40 - 20) / 2  # 40 x 80 in a 40 x 40 input: 20 rows of image, 10 of padding above and below
    canvas = torch.zeros(40, 40)
    canvas[10:30] = F.interpolate(truth[None, None], (20, 40), mode="area")[0, 0]
    back = to_original(canvas, [40, 80, scale, scale, offset, 0.0], interpolation)
    mask = back > 0.5
    assert torch.equal(mask, truth > 0.5)


def test_nearest_takes_a_logit_of_the_network_size() -> None:
    """Stretched or letterboxed, every pixel has one of the network's own values."""
    logits = torch.tensor([[[[1.0, -2.0], [3.0, -4.0]]]])
    stretched = [4.0, 6.0, 2 / 4, 2 / 6, 0.0, 0.0]
    [found] = original_probability(logits, (2, 2), [stretched], "nearest")
    assert torch.equal(found, logits[0, 0].repeat_interleave(2, 0).repeat_interleave(3, 1).sigmoid())
    letterbox = [2.0, 4.0, 0.5, 0.5, 0.5, 0.0]
    [found] = original_probability(logits, (2, 2), [letterbox], "nearest")
    assert set(found.flatten().tolist()) <= set(logits.sigmoid().flatten().tolist())
