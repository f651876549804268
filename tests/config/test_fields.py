"""Numbers outside their range are rejected, by key, before anything starts."""

import pytest

from amltrain.commands.train import read_run
from amltrain.config.fields import check_ranges, iter_keys
from amltrain.config.schema import RunConfig
from amltrain.errors import UserError


@pytest.mark.parametrize(
    ("flag", "value", "message"),
    [
        ("optim.lr", "-1", "optim.lr is -1.0 and must be at least 0"),
        ("optim.lr", ".nan", "optim.lr is nan and must be at least 0"),
        ("optim.clip_norm", "0", "optim.clip_norm is 0.0 and must be more than 0"),
        ("optim.betas", "[1.5,0.9]", "optim.betas is 1.5 and must lie between 0 and 1"),
        ("optim.milestones", "[30]", "optim.milestones is 30.0 and must lie between 0 and 1"),
        ("data.shapes.train", "0", "data.shapes.train is 0 and must be at least 1"),
        ("data.shapes.size", "4", "data.shapes.size is 4 and must be at least 16"),
        ("train.max_steps", "0", "train.max_steps is 0 and must be at least 1"),
        ("train.global_batch_size", "-4", "train.global_batch_size is -4 and must be at least 1"),
        ("evaluation.protocol.threshold", "2", "evaluation.protocol.threshold is 2.0 and must lie between 0 and 1"),
        ("checkpoint.keep", "-1", "checkpoint.keep is -1 and must be at least 1"),
        ("seed", "-1", "seed is -1 and must lie between"),
    ],
)
def test_rejected_by_key(flag: str, value: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        read_run([f"--{flag}={value}"])
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_every_key_is_one_of_a_run() -> None:
    """So that a renamed key does not lose its range."""
    for key in [name for name, own in iter_keys(RunConfig) if "low" in own.metadata]:
        value = RunConfig()
        for part in key.split("."):
            value = getattr(value, part)
    check_ranges(RunConfig())
