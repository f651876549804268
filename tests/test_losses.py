"""Losses against values written out by hand, in every precision, and what a user is told."""

import math

import pytest
import torch

from amltrain.errors import UserError
from amltrain.losses import check_channels, create_loss, upsample_logits
from amltrain.records import Batch, ModelOutput
from amltrain.registry import LOSSES


def batch_of(target: torch.Tensor) -> Batch:
    count, height, width = target.shape
    return Batch(
        image=torch.zeros(count, 3, height, width),
        input_ids=torch.zeros(count, 1, dtype=torch.long),
        text_mask=torch.ones(count, 1, dtype=torch.bool),
        target=target.to(torch.uint8),
        no_target=torch.zeros(count, dtype=torch.bool),
        sample_id=torch.arange(count),
        random_key=torch.arange(count),
        geometry=torch.zeros(count, 6, dtype=torch.float64),
    )


def test_weighted_cross_entropy_by_hand() -> None:
    """Pixels (background, referent) = (0, log 3): probabilities 1/4 and 3/4; one pixel of each class."""
    logits = torch.tensor([0.0, math.log(3)]).reshape(1, 2, 1, 1).expand(1, 2, 1, 2)
    loss = create_loss("weighted_cross_entropy")(ModelOutput(logits), batch_of(torch.tensor([[[0, 255]]])))["loss"]
    expected = (0.9 * math.log(4) + 1.1 * math.log(4 / 3)) / (0.9 + 1.1)
    assert loss.item() == pytest.approx(expected, rel=1e-6)


def test_class_weights_are_arguments() -> None:
    logits, batch = torch.randn(2, 2, 3, 3), batch_of(torch.zeros(2, 6, 6))
    plain = create_loss("weighted_cross_entropy", background_weight=7.0)(ModelOutput(logits), batch)["loss"]
    expected = torch.nn.functional.cross_entropy(
        upsample_logits(logits, (6, 6)), torch.zeros(2, 6, 6, dtype=torch.long)
    )
    torch.testing.assert_close(plain, expected)  # a mean over one class does not depend on its weight


def test_a_pixel_half_covered_is_the_referents() -> None:
    logits = torch.tensor([0.0, 5.0]).reshape(1, 2, 1, 1)
    loss = create_loss("weighted_cross_entropy")
    below, half = (loss(ModelOutput(logits), batch_of(torch.full((1, 1, 1), c)))["loss"] for c in (127, 128))
    assert half < 0.01 < below


def test_logits_are_upsampled_corner_to_corner() -> None:
    ramp = upsample_logits(torch.tensor([[[[0.0, 1.0]]]]), (1, 5))
    torch.testing.assert_close(ramp.flatten(), torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_losses_compute_in_float32_at_least(dtype: torch.dtype) -> None:
    logits = torch.randn(1, 2, 4, 4).to(dtype).requires_grad_()
    target = batch_of(torch.full((1, 8, 8), 255))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = create_loss("weighted_cross_entropy")(ModelOutput(logits), target)["loss"]
    assert loss.dtype == torch.promote_types(dtype, torch.float32)
    loss.backward()
    assert logits.grad.dtype == dtype


def test_class_weights_are_not_part_of_a_checkpoint() -> None:
    assert create_loss("weighted_cross_entropy").state_dict() == {}


def test_channels_that_are_not_known_are_not_checked() -> None:
    check_channels(torch.nn.Identity(), "Mine", 2)
    check_channels(create_loss("binary_cross_entropy"), "Mine", None)
    with pytest.raises(UserError, match="Mine gives 2"):
        check_channels(create_loss("binary_cross_entropy"), "Mine", 2)


def test_what_a_user_may_get_wrong() -> None:
    with pytest.raises(UserError, match="did you mean weighted_cross_entropy"):
        create_loss("weighted_crossentropy")
    with pytest.raises(UserError, match=r"'foreground_weight' \(loss\.kwargs\)"):
        create_loss("weighted_cross_entropy", foreground_weight=1.0)


def output_of(name: str, logits: torch.Tensor) -> ModelOutput:
    """Logits [2, C, 8, 8], and the extra outputs that a loss reads for two samples; masks among them are the logits."""
    corner = torch.tensor([[0.5, 0.5, 0.5, 0.5]]).repeat(2, 1)
    heads = {
        "rela": {"minimap": torch.zeros(2, 4, 2), "no_target": torch.zeros(2, 2)},
        "cgformer": {f"assigned{i}": torch.rand(2, 4, 4, generator=torch.Generator().manual_seed(i)) for i in range(3)},
        "mask_and_presence": {"no_target": torch.zeros(2, 2)},
        "language_and_masks": {"language_loss": torch.zeros(())},
        "barleria": {"reconstruction": torch.zeros(2)},
        "c3vg": {"coarse_logits": torch.zeros(2, 1, 8, 8), "box": corner, "coarse_box": corner},
        "instances": {
            "scores": torch.zeros(2, 1, 3),
            "boxes": corner[:, None, None].repeat(1, 1, 3, 1),
            "masks": logits[:, :1].repeat(1, 3, 1, 1),
            "presence": torch.zeros(2, 1),
            "semantic": logits[:, :1],
        },
    }
    return ModelOutput(logits, heads.get(name, {}))


WEIGHING = [entry.name for entry in LOSSES.entries() if getattr(entry.value, "weighs_pixels", False)]


@pytest.mark.parametrize("name", WEIGHING)
def test_pixels_of_weight_0_teach_nothing_and_weights_of_1_change_nothing(name: str) -> None:
    torch.manual_seed(0)
    logits = torch.randn(2, getattr(LOSSES[name].value, "channels", 1), 8, 8, requires_grad=True)
    batch = batch_of((torch.rand(2, 8, 8) > 0.5) * 255)
    loss = create_loss(name)
    plain = loss(output_of(name, logits), batch)["loss"]
    ones = loss(output_of(name, logits), batch._replace(loss_weight=torch.ones(2, 8, 8)))["loss"]
    torch.testing.assert_close(ones, plain)
    weights = torch.ones(2, 8, 8)
    weights[:, :3] = 0
    weighed = batch._replace(loss_weight=weights)
    loss(output_of(name, logits), weighed)["loss"].backward()
    assert (logits.grad[:, :, :3] == 0).all() and (logits.grad[:, :, 3:] != 0).any()
    moved = logits.detach().clone()
    moved[:, :, :3] += 5
    values = [loss(output_of(name, given), weighed)["loss"] for given in (logits.detach(), moved)]
    if name != "c3vg":  # its boxes are compared with the whole mask
        torch.testing.assert_close(values[0], values[1])
    nothing = loss(output_of(name, logits), batch._replace(loss_weight=torch.zeros(2, 8, 8)))["loss"]
    assert nothing.isfinite()


def test_most_losses_weigh_pixels() -> None:
    assert {"weighted_cross_entropy", "binary_cross_entropy", "cross_entropy_dice", "rela", "cgformer"} <= set(WEIGHING)
