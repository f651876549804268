"""Masks at network and original size; the letterbox's way back is compared with recorded OpenCV 4.8 output."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from amltrain.data.transforms import ImageTransform
from amltrain.evaluation.masks import (
    Masks,
    count_pixels,
    network_probability,
    original_probability,
    output_masks,
    referent_margin,
    to_original,
)
from amltrain.evaluation.metrics import metric_terms, scored_columns
from amltrain.evaluation.results import SAMPLE_COLUMNS, named_protocol
from amltrain.records import Batch, ModelOutput


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


def boxes(predicted: Tensor, truth: Tensor) -> tuple[int, int]:
    """Columns of `count_pixels` for one sample at network size."""
    height, width = truth.shape
    batch = Batch(
        image=torch.zeros(1, 3, height, width), input_ids=torch.zeros(1, 1, dtype=torch.int64),
        text_mask=torch.ones(1, 1, dtype=torch.bool), target=truth[None].to(torch.uint8) * 255,
        no_target=torch.tensor([False]), sample_id=torch.tensor([0]), random_key=torch.tensor([0]),
        geometry=torch.tensor([[height, width, 1.0, 1.0, 0.0, 0.0]], dtype=torch.float64),
    )  # fmt: skip
    masks = Masks([predicted], None, torch.ones(1, dtype=torch.bool))
    row = dict(zip(SAMPLE_COLUMNS, count_pixels(masks, batch, named_protocol("lavt"))[0].tolist(), strict=True))
    return row["box_intersection"], row["box_union"]


def drawn(*points: tuple[int, int]) -> Tensor:
    mask = torch.zeros(10, 8, dtype=torch.bool)
    for row, column in points:
        mask[row, column] = True
    return mask


@pytest.mark.parametrize(
    ("predicted", "truth", "wanted"),
    [
        (drawn((1, 1), (3, 4)), drawn((2, 2), (4, 6)), (2 * 3, 12 + 15 - 6)),
        (drawn((0, 0)), drawn((9, 7)), (0, 2)),
        (drawn((0, 0), (9, 7)), drawn((0, 0), (9, 7)), (80, 80)),
        (drawn(), drawn((2, 2), (4, 6)), (0, 15)),
        (drawn((2, 2), (4, 6)), drawn(), (0, 15)),
        (drawn(), drawn(), (0, 0)),
    ],
)
def test_boxes_around_the_masks(predicted: Tensor, truth: Tensor, wanted: tuple[int, int]) -> None:
    assert boxes(predicted, truth) == wanted


def detection_batch(geometry: Tensor, target: Tensor, box: Tensor | None) -> Batch:
    """A batch at 100 x 100 pixels."""
    count = len(geometry)
    each = torch.arange(count)
    return Batch(
        image=torch.zeros(count, 3, 100, 100),
        input_ids=each[:, None],
        text_mask=torch.ones(count, 1, dtype=torch.bool),
        target=target,
        no_target=torch.zeros(count, dtype=torch.bool),
        sample_id=each,
        random_key=each,
        geometry=geometry,
        box=box,
    )


def detected(shares: Tensor, batch: Batch) -> list[tuple[int, int]]:
    """The model's own boxes against the true ones: intersection and union as `count_pixels` gives them."""
    count, protocol = len(shares), named_protocol("lavt")
    output = ModelOutput(torch.zeros(count, 1, 25, 25), {"box": shares})
    counted = count_pixels(output_masks(output, batch, batch.geometry.tolist(), protocol), batch, protocol)
    rows = [dict(zip(SAMPLE_COLUMNS, row, strict=True)) for row in counted.tolist()]
    return [(row["detected_intersection"], row["detected_union"]) for row in rows]


@pytest.mark.parametrize("resize", ["square", "letterbox", "longest"])
def test_boxes_are_compared_in_the_original_image(resize: str) -> None:
    """By hand: a true box 40 x 20 of a 200 x 50 image, and predictions moved by a quarter, or into the padding."""
    geometry = ImageTransform(100, resize).geometry(50, 200).repeat(3, 1)
    scale_y, scale_x, offset_y, offset_x = geometry[0, 2:].tolist()

    def network(x1: float, y1: float, x2: float, y2: float) -> list[float]:
        return [x1 * scale_x + offset_x, y1 * scale_y + offset_y, x2 * scale_x + offset_x, y2 * scale_y + offset_y]

    true = torch.tensor([network(100, 10, 140, 30), network(100, 10, 140, 30), network(0, 30, 200, 50)])
    predicted = torch.tensor([network(110, 10, 150, 30), network(100, 10, 140, 30), network(-30, 30, 230, 90)])
    centre, extent = (predicted[:, :2] + predicted[:, 2:]) / 2, predicted[:, 2:] - predicted[:, :2]
    batch = detection_batch(geometry, torch.zeros(3, 100, 100, dtype=torch.uint8), true)
    found = detected(torch.cat([centre, extent], dim=1) / 100, batch)
    pixels = [(600, 1000), (800, 800), (4000, 4000)]  # the last one is cut at the picture's borders
    assert [(round(i / 4096), round(u / 4096)) for i, u in found] == pixels
    for (i, u), (both, either) in zip(found, pixels, strict=True):
        assert i / u == pytest.approx(both / either, abs=2e-3)


def test_detections_agree_with_counted_pixels() -> None:
    """The other way to compute it: boxes of whole pixels painted as masks and counted, without any geometry."""
    generator = torch.Generator().manual_seed(0)
    first = torch.randint(0, 50, (64, 4), generator=generator)
    first[:, 2:] = first[:, :2] + 20
    moved = first + torch.randint(0, 15, (64, 4), generator=generator)
    corners = torch.stack([first, moved], dim=1)  # [64, 2, 4]
    grid = torch.arange(100)

    def painted(box: Tensor) -> Tensor:
        rows, columns = ((grid >= box[i]) & (grid < box[i + 2]) for i in (1, 0))
        return rows[:, None] & columns

    masks = torch.stack([torch.stack([painted(box) for box in pair]) for pair in corners])
    counts = [(int((a & b).sum()), int((a | b).sum())) for a, b in masks]
    geometry = torch.tensor([[100.0, 100.0, 1.0, 1.0, 0.0, 0.0]], dtype=torch.float64).repeat(64, 1)
    shares = torch.cat([corners[:, 0, :2] + corners[:, 0, 2:], 2 * (corners[:, 0, 2:] - corners[:, 0, :2])], 1) / 200
    for box in (corners[:, 1].float(), None):  # given, or around the target's mask
        batch = detection_batch(geometry, masks[:, 1].to(torch.uint8) * 255, box)
        found = detected(shares, batch)
        assert [(i / 4096, u / 4096) for i, u in found] == counts
    i, u = (list(column) for column in zip(*found, strict=True))
    scored = scored_columns(i, u, detected=(i, u))
    share = sum(both / either >= 0.5 for both, either in counts) / 64
    assert 0 < share < 1
    assert metric_terms("DetAcc@0.5", scored, "classic").percent() == pytest.approx(100 * share)


def test_a_model_without_boxes_has_none_to_compare() -> None:
    geometry = torch.tensor([[100.0, 100.0, 1.0, 1.0, 0.0, 0.0]], dtype=torch.float64)
    batch = detection_batch(geometry, torch.full((1, 100, 100), 255, dtype=torch.uint8), None)
    output, protocol = ModelOutput(torch.zeros(1, 1, 25, 25)), named_protocol("lavt")
    masks = output_masks(output, batch, geometry.tolist(), protocol)
    assert masks.boxes is None
    assert count_pixels(masks, batch, protocol)[0, -2:].tolist() == [0, 0]
