"""When masking starts and how it grows: a function of the step, on the device, the same after a resume."""

import pytest
import torch

from amltrain.errors import UserError
from amltrain.methods.aml.masking import Curriculum
from tests.methods.aml.test_method import make_task
from tests.methods.aml.test_step import toy_batch, toy_task


def test_factor_by_step() -> None:
    assert [Curriculum(2, 4).factor(step) for step in range(8)] == [0, 0, 0.25, 0.5, 0.75, 1, 1, 1]
    assert [Curriculum(2).factor(step) for step in range(4)] == [0, 0, 1, 1]
    assert not Curriculum().changes


def masked_shares(steps: range, **options) -> list[float]:
    batch = toy_batch(batch=16)
    task = toy_task(tau=0.7, **options)
    task.calibrate([batch])
    found = []
    for step in steps:
        task.before_step(step, [batch])
        found.append(task.blocks(task.score(batch), batch).float().mean().item())
    return found


@pytest.mark.parametrize("options", [{"ramp": "tau"}, {"ramp": "rho", "selection": "patch"}, {"selection": "released"}])
def test_masks_grow_from_nothing_to_those_without_a_curriculum(options: dict) -> None:
    shares = masked_shares(range(8), start_after=2, ramp_steps=4, **options)
    [full] = masked_shares(range(1), **{k: v for k, v in options.items() if k != "ramp"})
    assert shares[:2] == [0, 0]
    assert shares[2] <= shares[4] <= shares[5] == shares[7] == full > 0
    assert shares[2] < full or options == {"selection": "released"}  # which takes all as soon as it takes any
    assert masked_shares(range(3, 8), start_after=2, ramp_steps=4, **options) == shares[3:]  # resumed at step 3


def test_the_random_control_grows_alike() -> None:
    shares = masked_shares(range(6), level="random", random_shares=[0.5], start_after=1, ramp_steps=4)
    assert shares[0] == 0 and shares[4] == 0.5 and shares[1] < shares[3] < 0.5


def test_nothing_of_it_is_saved() -> None:
    """A run may be resumed that was started before curricula existed."""
    assert make_task(start_after=3).state_dict().keys() == make_task().state_dict().keys()


def test_a_learnable_projection_cannot_wait() -> None:
    with pytest.raises(UserError, match=r"from the first step: set aml\.start_after=0"):
        make_task(projection="learnable", start_after=5)
    with pytest.raises(UserError, match=r"aml\.ramp_steps=-1"):
        make_task(ramp_steps=-1)


def test_nothing_waits_for_the_device() -> None:
    masker = toy_task(start_after=1, ramp_steps=3, selection="patch").masker.to("meta")
    batch = toy_batch().mapped(lambda part: part.to("meta"))
    for step in range(3):
        masker.set_step(step)
        assert masker.blocks(torch.rand(4, 4, 3, device="meta"), batch).shape == (4, 4, 3)
