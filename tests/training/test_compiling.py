"""Which blocks are compiled, and that a compiled run computes the same."""

import json
from pathlib import Path

import pytest
import torch

from amltrain.models import create_model
from amltrain.models.backbones.swin import SwinBlock, SwinStage, shift_mask
from amltrain.training.optim import compile_blocks, repeated_blocks, uncompiled
from tests.training.runs import run


def test_the_innermost_repeated_blocks_are_found() -> None:
    kinds = [type(block).__name__ for block in repeated_blocks(create_model("caris_tiny"))]
    assert kinds == ["SwinBlock"] * 8 + ["BertLayer"] * 2 + ["FusionLayer"] * 3


def test_a_compiled_stage_computes_the_same_and_keeps_its_names() -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    stage = SwinStage(32, 2, 2, 4, (0.0, 0.0), merge=False).train()
    names, x = list(stage.state_dict()), torch.randn(2, 6, 6, 32)
    assert shift_mask(8, 8, 4, 2, like=x).any()

    def gradients() -> list[torch.Tensor]:
        stage.zero_grad()
        stage(x).square().sum().backward()
        return [parameter.grad.clone() for parameter in stage.parameters() if parameter.grad is not None]

    expected = gradients()
    assert compile_blocks(stage, backend="aot_eager") == 2
    for given, wanted in zip(gradients(), expected, strict=True):
        torch.testing.assert_close(given, wanted, rtol=1e-5, atol=1e-6)
    assert list(stage.state_dict()) == names
    assert isinstance(stage.blocks[0], SwinBlock)
    with uncompiled(), torch.no_grad():
        traced = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        stage(x[:1])
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == traced


@pytest.mark.slow
def test_a_compiled_run_loses_as_an_eager_one(shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four minutes of CPU time. Compiled code draws other random numbers unless told to draw torch's."""
    monkeypatch.setattr("torch._inductor.config.fallback_random", True)
    losses = {}
    for compiled in ("false", "true"):
        output = tmp_path / compiled
        run(shapes, output, "--train.compile", compiled)
        lines = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
        losses[compiled] = [line["loss"] for line in lines if "loss" in line]
    assert len(losses["true"]) == 8
    assert losses["true"] == pytest.approx(losses["false"], rel=1e-3)
    assert losses["true"] != losses["false"]  # other kernels round differently: it was compiled
