"""AFM: hand-computed masks, the recorded study of shares, and what must never change."""

import json

import pytest
import torch

from amltrain.methods.aml.masking import (
    filtering_mask,
    random_blocks,
    relocate,
    select_by_pixel,
    split_blocks,
    take_share,
    weak_pixels,
)
from amltrain.methods.base import mask_image, spread_blocks
from amltrain.randomness import random_key

SELECTIONS = ["pixel", "patch", "released"]


def keys(count: int, step: int = 0) -> torch.Tensor:
    return torch.tensor([random_key(0, step, i) for i in range(count)])


def score_maps(count: int, side: int, low_patches: int, correlation: int, seed: int = 0) -> torch.Tensor:
    """Random fields with exactly `low_patches` values in 0.15..0.395, the rest in 0.405..1."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(count, 1, side + 8, side + 8, generator=generator)
    if correlation:
        axis = torch.arange(-4.0, 5.0)
        kernel = torch.exp(-(axis**2) / (2 * correlation**2))
        noise = torch.nn.functional.conv2d(noise, (kernel[:, None] * kernel[None])[None, None])
    else:
        noise = noise[..., 4:-4, 4:-4]
    order = noise.flatten(1).argsort(1).argsort(1)
    low = 0.15 + 0.245 * torch.rand(count, low_patches, generator=generator)
    high = 0.405 + 0.595 * torch.rand(count, side**2 - low_patches, generator=generator)
    values = torch.cat([low, high], dim=1).sort(dim=1).values
    return values.gather(1, order).view(count, side, side)


def test_hand_computed_upsampling_and_weak_pixels() -> None:
    scores = torch.tensor([[[0.0, 1.0], [1.0, 1.0]]])
    # 2 x 2 -> 4 x 4, align_corners False: source positions 0, 0.25, 0.75, 1 in each direction
    expected = [[1, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]]
    assert weak_pixels(scores, (4, 4), tau=0.4)[0].int().tolist() == expected  # 0, .25, .25, .4375, ...
    expected[1][1] = 1
    assert weak_pixels(scores, (4, 4), tau=0.5)[0].int().tolist() == expected


def test_hand_computed_blocks() -> None:
    weak = weak_pixels(torch.tensor([[[0.0, 1.0], [1.0, 1.0]]]), (4, 4), tau=0.4)
    blocks = split_blocks(weak, block=2)
    assert blocks.sum(dim=(-2, -1)).tolist() == [[[3, 0], [0, 0]]]
    assert select_by_pixel(blocks, 1.0, keys(1)).tolist() == [[[True, False], [False, False]]]
    assert not select_by_pixel(blocks, 0.0, keys(1)).any()
    image = torch.ones(1, 3, 4, 4)
    masked = mask_image(image, select_by_pixel(blocks, 1.0, keys(1)), block=2)
    assert masked[0, 1].tolist() == [[0, 0, 1, 1], [0, 0, 1, 1], [1, 1, 1, 1], [1, 1, 1, 1]]


def test_pixel_selection_has_the_probability_of_its_count() -> None:
    weak = torch.zeros(20000, 1, 3, 2, 2, dtype=torch.bool)
    weak[:, 0, 1, 0, 0] = True  # one weak pixel, then three
    weak[:, 0, 2].view(-1, 4)[:, :3] = True
    share = select_by_pixel(weak, 0.25, keys(20000)).float().mean(0)[0]
    torch.testing.assert_close(share, torch.tensor([0.0, 0.25, 1 - 0.75**3]), atol=0.01, rtol=0)


@pytest.mark.parametrize(("size", "grid"), [((70, 45), (3, 2)), ((33, 32), (2, 1)), ((448, 448), (14, 14))])
def test_sides_that_are_no_multiple_of_a_block(size: tuple[int, int], grid: tuple[int, int]) -> None:
    for selection in SELECTIONS:
        blocks = filtering_mask(torch.zeros(2, *grid), size, keys(2), selection=selection)
        assert blocks.shape == (2, *grid)
        masked = mask_image(torch.ones(2, 3, *size), blocks, 32)
        assert masked.shape == (2, 3, *size)
        assert (masked == 0).any()


@pytest.mark.parametrize("selection", SELECTIONS)
def test_nothing_is_masked_where_nothing_is_weak(selection: str) -> None:
    scores = torch.full((3, 7, 7), 0.41)
    assert not filtering_mask(scores, (224, 224), keys(3), selection=selection).any()
    assert not filtering_mask(scores * 0, (224, 224), keys(3), tau=0.0, selection=selection).any()


@pytest.mark.parametrize("selection", SELECTIONS)
def test_a_mask_depends_on_its_sample_and_step_alone(selection: str) -> None:
    scores = score_maps(6, 7, low_patches=12, correlation=1)
    together = filtering_mask(scores, (224, 224), keys(6), selection=selection)
    one_by_one = [
        filtering_mask(scores[i : i + 1], (224, 224), keys(6)[i : i + 1], selection=selection) for i in range(6)
    ]
    assert torch.equal(together, torch.cat(one_by_one))
    if selection != "released":  # which takes everything
        assert not torch.equal(together, filtering_mask(scores, (224, 224), keys(6, step=1), selection=selection))


def test_patch_selection_takes_a_quarter_of_the_weak_patches() -> None:
    for low, taken in ((1, 1), (5, 1), (20, 5), (98, 24), (196, 49)):
        scores = score_maps(4, 14, low, correlation=1)
        blocks = filtering_mask(scores, (448, 448), keys(4), selection="patch")
        assert blocks.sum(dim=(1, 2)).tolist() == [taken] * 4
        assert (scores[blocks] < 0.4).all()


def test_patch_selection_averages_a_finer_score_map() -> None:
    scores = score_maps(1, 4, low_patches=3, correlation=0)
    fine = scores.repeat_interleave(2, 1).repeat_interleave(2, 2)
    for name in SELECTIONS[1:2]:
        coarse_mask = filtering_mask(scores, (128, 128), keys(1), selection=name)
        assert torch.equal(coarse_mask, filtering_mask(fine, (128, 128), keys(1), selection=name))


def test_share_of_nothing_is_nothing() -> None:
    candidates = torch.tensor([[False] * 5, [True] * 4 + [False]])
    taken = take_share(candidates, 0.25, torch.tensor([[0.1] * 5, [0.4, 0.1, 0.3, 0.2, 0.0]]))
    assert taken.int().tolist() == [[0] * 5, [0, 1, 0, 0, 0]]


@pytest.mark.parametrize("selection", SELECTIONS)
def test_no_share_masks_nothing(selection: str) -> None:
    scores = score_maps(4, 14, 40, 0)
    assert not filtering_mask(scores, (448, 448), keys(4), rho=0.0, selection=selection).any()
    assert filtering_mask(scores, (448, 448), keys(4), rho=1e-6, selection=selection).any() == (selection != "pixel")


def test_relocation_keeps_the_amount() -> None:
    blocks = filtering_mask(score_maps(5, 14, 20, 1), (448, 448), keys(5))
    moved = relocate(blocks, keys(5))
    assert torch.equal(moved.sum(dim=(1, 2)), blocks.sum(dim=(1, 2)))
    assert not torch.equal(moved, blocks)
    hits = torch.stack([relocate(blocks, keys(5, step)) for step in range(200)]).float().mean(0)
    expected = blocks.float().mean(dim=(1, 2), keepdim=True).expand_as(hits)
    torch.testing.assert_close(hits, expected, atol=0.17, rtol=0)


def test_the_random_control_hides_its_shares_exactly_on_average() -> None:
    shares = torch.tensor([0.0, 0.1, 0.35])  # of 36 blocks: 0, 3.6 and 12.6
    blocks = random_blocks((6, 6), shares, keys(6000))
    counts = blocks.sum(dim=(1, 2))
    assert sorted(set(counts.tolist())) == [0, 3, 4, 12, 13]
    assert abs(blocks.float().mean() - shares.mean()) < 0.004
    for low, high, share in ((0, 0, 0.0), (3, 4, 0.1), (12, 13, 0.35)):
        drawn = counts[(counts >= low) & (counts <= high)].float()
        assert abs(len(drawn) / 6000 - 1 / 3) < 0.03
        assert abs(drawn.mean() / 36 - share) < 0.002
    places = blocks.float().mean(0)
    torch.testing.assert_close(places, places.mean().expand_as(places), atol=0.025, rtol=0)
    assert torch.equal(blocks[:5], random_blocks((6, 6), shares, keys(5)))  # of the sample's key alone
    assert not torch.equal(blocks[:9], random_blocks((6, 6), shares, keys(9, step=1)))
    assert random_blocks((2, 2), torch.tensor([1.0]), keys(3)).all()


def test_nothing_waits_for_the_device() -> None:
    scores, image = torch.rand(2, 7, 7), torch.rand(2, 3, 224, 224)
    for selection in SELECTIONS:
        # the meta device has no values: anything that reads one raises
        blocks = filtering_mask(scores.to("meta"), (224, 224), keys(2).to("meta"), selection=selection)
        random_blocks((7, 7), torch.tensor([0.1, 0.2], device="meta"), keys(2).to("meta"))
        assert mask_image(image.to("meta"), relocate(blocks, keys(2).to("meta")), 32).shape == image.shape


@pytest.mark.parametrize(("correlation", "low"), [(0, 1), (0, 5), (0, 20), (0, 98), (1, 5), (1, 20), (1, 98)])
def test_masked_share_of_the_recorded_study(shared_dir, correlation: int, low: int) -> None:
    study = json.loads((shared_dir / "goldens" / "amlris_release" / "mask_fraction_study.json").read_text())
    expected = study[f"{float(correlation)}/{low}"]
    scores = score_maps(16, 14, low, correlation)
    measured = {
        name: filtering_mask(scores, (448, 448), keys(16), selection=name).float().mean() for name in SELECTIONS
    }
    # 16 maps of another generator than the study's 30: a few points apart
    assert abs(measured["pixel"] - expected["paper"]) < 0.035
    assert abs(measured["released"] - expected["release"]) < 0.1
    assert abs(measured["patch"] - expected["intended"]) < 1e-6
    blocks = spread_blocks(filtering_mask(scores, (448, 448), keys(16)), (448, 448), 32)
    assert not (weak_pixels(scores, (448, 448), 0.4).any() and not blocks.any())
