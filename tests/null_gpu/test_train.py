"""`amltrain train` on null GPUs: it trains, saves, stops and resumes on the device, on one card and on two."""

import json
from pathlib import Path

import pytest
import torch

from tests.null_gpu.device import NullGPU
from tests.training import runs

TWO_STEPS = ("--train.max_steps", "2", "--train.mixed_precision", "bf16", "--train.ema_decay", "0.9",
             "--evaluation.splits", "[]", "--checkpoint.every_steps", "1", "--aml.temperature", "0.05")  # fmt: skip
"""No evaluation: it checks values, which the device does not have."""


@pytest.mark.parametrize("cards", [1, 2])
def test_it_trains_stops_and_resumes(cards: int, null_gpu: NullGPU, shapes: Path, tmp_path: Path) -> None:
    """The weights are those of the start, copied to the device and back: no kernel changes them."""
    output = tmp_path / "run"
    program = ["-m", "amltrain"] if cards == 1 else ["-m", "tests.null_gpu.several"]
    arguments = [*program, "train", *runs.arguments(shapes, output, *TWO_STEPS)]
    for step, extra in ((1, ["--train.stop_after", "1"]), (2, [])):
        first, *_ = null_gpu.run_on_cards(cards, *arguments, *extra)
        assert f"step {step}/{step} (100%)" in first
        assert "precision  bf16" in first and "device     cuda" in first
        assert json.loads((output / "last" / "state" / "trainer.json").read_text())["step"] == step
    assert [row["step"] for row in runs.log(output) if "loss" in row] == [1, 2]
    saved, resumed = runs.weights(output, "step-000001"), runs.weights(output, "step-000002")
    assert saved.keys() == resumed.keys() and all(torch.equal(saved[key], resumed[key]) for key in saved)
    assert sum(bool(tensor.any()) for tensor in saved.values()) > len(saved) / 2
