"""Boxes by hand and against torchvision; matching against transformers' matcher."""

from unittest.mock import patch

import pytest
import torch
from safetensors.torch import load_file
from torchvision.ops import generalized_box_iou_loss
from transformers.models.mask2former.modeling_mask2former import Mask2FormerHungarianMatcher

from amltrain.losses import consistency, create_loss, dice_loss
from amltrain.matching import (
    assign,
    box_loss,
    box_overlap,
    boxes_of_masks,
    corners_of,
    matching_cost,
    sample_points,
    share_outside,
    shares_of,
    uncertain_points,
)


def test_shares_and_corners_are_inverse():
    corners = torch.tensor([[10.0, 20.0, 30.0, 60.0], [0.0, 0.0, 80.0, 100.0]])
    shares = shares_of(corners, (100, 80))
    assert shares.tolist() == [[0.25, pytest.approx(0.4), 0.25, pytest.approx(0.4)], [0.5, 0.5, 1.0, 1.0]]
    torch.testing.assert_close(corners_of(shares) * torch.tensor([80.0, 100.0, 80.0, 100.0]), corners)


def test_overlap_by_hand():
    one = torch.tensor([[0.0, 0.0, 2.0, 2.0], [0.0, 0.0, 1.0, 1.0], [1.0, 1.0, 1.0, 1.0]])
    other = torch.tensor([[1.0, 0.0, 3.0, 2.0], [3.0, 0.0, 4.0, 1.0], [1.0, 1.0, 1.0, 1.0]])
    iou, giou = box_overlap(one, other)
    assert iou.tolist() == [pytest.approx(1 / 3), 0.0, 0.0]
    assert giou.tolist() == [pytest.approx(1 / 3), pytest.approx(-0.5), 0.0]


def test_box_loss_equals_torchvision():
    torch.manual_seed(0)
    predicted, target = torch.rand(50, 4), torch.rand(50, 4)
    expected = 5 * (predicted - target).abs().sum(1) + 2 * generalized_box_iou_loss(
        corners_of(predicted), corners_of(target)
    )
    torch.testing.assert_close(box_loss(predicted, target), expected, rtol=1e-4, atol=1e-5)


def test_boxes_of_masks_by_hand():
    masks = torch.zeros(3, 6, 8, dtype=torch.bool)
    masks[0, 2, 3] = True
    masks[1, 1:4, 2:7] = True
    assert boxes_of_masks(masks).tolist() == [[3, 2, 4, 3], [2, 1, 7, 4], [0, 0, 0, 0]]
    assert boxes_of_masks(masks, end=0).tolist() == [[3, 2, 3, 2], [2, 1, 6, 3], [0, 0, 0, 0]]


def test_share_outside_by_hand():
    masks = torch.zeros(3, 4, 4, dtype=torch.bool)
    masks[:2, 1:3, 0:4] = True
    corners = torch.tensor([[1.9, -3.0, 9.0, 2.7], [0.0, 0.0, 4.0, 4.0], [0.0, 0.0, 4.0, 4.0]])
    assert share_outside(masks, corners).tolist() == [1 - 3 / 8, 0.0, 1.0]


def test_terms_equal_the_recorded_ones(shared_dir):
    """Made-up boxes and masks through the official C3VG losses: disjoint boxes, an empty mask, a mask of one pixel."""
    recorded = load_file(shared_dir / "goldens" / "c3vg" / "losses.safetensors")
    predicted = recorded["input.pred_boxes"].requires_grad_()
    wanted = shares_of(recorded["input.boxes"], (40, 40))
    torch.testing.assert_close(wanted, recorded["box.target_normalised"], rtol=1e-9, atol=1e-9)
    loss = box_loss(predicted, wanted).mean()
    torch.testing.assert_close(loss, recorded["box.loss"], rtol=1e-7, atol=0)
    torch.testing.assert_close(torch.autograd.grad(loss, predicted)[0], recorded["box.grad"], rtol=1e-5, atol=1e-7)
    giou = box_overlap(corners_of(predicted), corners_of(wanted))[1]
    torch.testing.assert_close(giou, recorded["box.giou_per_sample"], rtol=1e-6, atol=1e-7)

    logits = recorded["input.logits"].requires_grad_()
    truth = recorded["input.target"][:, None].float()
    torch.testing.assert_close(dice_loss(logits, truth), recorded["mask.dice"], rtol=1e-6, atol=0)
    masks = logits[:, 0] > 0
    around = boxes_of_masks(masks, end=0)
    torch.testing.assert_close(around, recorded["consistency.mask_box_pixels"], rtol=0, atol=0)
    outside = share_outside(masks, corners_of(predicted) * 40)
    torch.testing.assert_close(outside, recorded["consistency.s2b"], rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(
        box_loss(predicted, shares_of(around, (40, 40))), recorded["consistency.b2s"], rtol=1e-6, atol=1e-6
    )
    contradiction = 0.1 * consistency(logits, predicted).mean()
    torch.testing.assert_close(contradiction, recorded["consistency.loss_before_stage_weight"], rtol=1e-6, atol=1e-8)
    (gradient,) = torch.autograd.grad(contradiction, predicted)
    torch.testing.assert_close(gradient, recorded["consistency.grad_boxes"], rtol=1e-5, atol=1e-8)


def test_matching_equals_transformers_matcher():
    """With the same points: the same assignments of 2, 0 and 4 referents to 6 queries."""
    torch.manual_seed(0)
    masks, refer = torch.randn(3, 6, 16, 24), torch.randn(3, 6, 2)
    targets = [(torch.rand(count, 16, 24) > 0.5).float() for count in (2, 0, 4)]
    points = torch.rand(3, 200, 2)
    theirs = Mask2FormerHungarianMatcher(cost_class=2.0, cost_mask=5.0, cost_dice=5.0, num_points=200)
    with patch("torch.rand", side_effect=list(points[:, None])):
        expected = theirs(masks, refer, targets, [torch.zeros(len(target), dtype=torch.long) for target in targets])
    for i, target in enumerate(targets):
        cost = matching_cost(masks[i, None], refer[i, None], target[None], points[i, None])
        assert [found.tolist() for found in assign(cost[0])] == [found.tolist() for found in expected[i]]


def test_assignment_by_hand():
    cost = torch.tensor([[4.0, 1.0], [2.0, 0.0], [float("nan"), 9.0]])
    assert [found.tolist() for found in assign(cost)] == [[0, 1], [1, 0]]
    assert [found.tolist() for found in assign(cost[:, :0])] == [[], []]


def test_points_are_shares_of_the_image():
    maps = torch.arange(12.0).reshape(1, 1, 3, 4)
    points = torch.tensor([[[0.125, 1 / 6], [0.875, 5 / 6], [0.25, 0.5]]])
    torch.testing.assert_close(sample_points(maps, points), torch.tensor([[[0.0, 11.0, 4.5]]]))


def test_uncertain_points_are_nearest_to_zero():
    logits = torch.tensor([[[[-9.0, 0.1, 5.0, -0.2]]]])
    candidates = torch.tensor([[[x, 0.5] for x in (0.125, 0.375, 0.625, 0.875)]])
    others = torch.tensor([[[0.5, 0.5]]])
    chosen = uncertain_points(logits, candidates, others, 2)
    assert chosen[0].tolist() == [[0.375, 0.5], [0.875, 0.5], [0.5, 0.5]]
    assert uncertain_points(logits[:0], candidates[:0], others[:0], 2).shape == (0, 3, 2)


def test_random_points_are_functions_of_the_sample():
    loss, keys = create_loss("deris", points=8), torch.tensor([5, -7, 11])
    assert torch.equal(loss.draw(3, keys, 8)[1:2], loss.draw(3, keys[1:2], 8))
    assert not torch.equal(loss.draw(3, keys, 8), loss.draw(4, keys, 8))
    assert loss.draw(3, keys, 8).min() >= 0 and loss.draw(3, keys, 8).max() < 1
