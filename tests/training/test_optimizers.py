"""timm's optimizers: every one of the list trains and resumes bit for bit, from tensors and numbers alone."""

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from amltrain.checkpoints import state
from amltrain.commands.list import optimizer_lines
from amltrain.config.schema import OptimConfig
from amltrain.errors import UserError
from amltrain.training.optim import ADAM, OPTIMIZERS, arguments, build_optimizer, check_optimizer
from tests.training import runs


class Layers(nn.Module):
    """Matrices wide enough to be factored, vectors and kernels."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Sequential(nn.Linear(6, 160), nn.LayerNorm(160), nn.Linear(160, 144), nn.Linear(144, 3))
        self.kernel = nn.Conv2d(3, 4, 3)

    def loss(self, step: int) -> Tensor:
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(5, 6, generator=generator)
        image = torch.randn(2, 3, 6, 6, generator=generator)
        return self.model(x).square().mean() + self.kernel(image).square().mean()


def started(name: str) -> tuple[Layers, Optimizer]:
    torch.manual_seed(0)
    layers = Layers()
    groups = [
        {"params": [p for p in layers.parameters() if (p.ndim > 1) == decays], "lr": 1e-3, "weight_decay": 0.1 * decays}
        for decays in (True, False)
    ]
    return layers, build_optimizer(groups, **arguments(OptimConfig(optimizer=name, lr=1e-3)))


def train(layers: Layers, optimizer: Optimizer, first: int, last: int) -> None:
    for step in range(first, last):
        optimizer.zero_grad()
        layers.loss(step).backward()
        optimizer.step()


def write(checkpoint: Path, snapshot: state.Snapshot) -> None:
    for folder in (state.STATE, state.MODEL):
        (checkpoint / folder).mkdir(parents=True)
    state.write_state(checkpoint / state.STATE, snapshot)
    save_file(snapshot.weights, checkpoint / state.MODEL / "model.safetensors")


@pytest.mark.parametrize("name", [*ADAM, *OPTIMIZERS])
def test_every_optimizer_resumes_bit_for_bit(name: str, tmp_path: Path) -> None:
    whole, optimizer = started(name)
    before = [parameter.detach().clone() for parameter in whole.parameters()]
    train(whole, optimizer, 0, 6)
    assert any(not torch.equal(a, b) for a, b in zip(before, whole.parameters(), strict=True))
    half, optimizer = started(name)
    train(half, optimizer, 0, 3)
    write(tmp_path / "step-000003", state.take_snapshot(half, optimizer, None, None))
    again, optimizer = started(name)
    again.load_state_dict(half.state_dict())
    torch.manual_seed(99)  # nothing random is left over from the start
    state._load_optimizer(state.SavedState(tmp_path / "step-000003"), again, optimizer)
    train(again, optimizer, 3, 6)
    for (key, expected), found in zip(whole.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(expected, found), key


def test_a_tensor_that_is_gone_is_named(tmp_path: Path) -> None:
    layers, optimizer = started("muon")
    train(layers, optimizer, 0, 1)
    snapshot = state.take_snapshot(layers, optimizer, None, None)
    gone = next(key for key in snapshot.optimizer if key.endswith("exp_avg"))
    kept = {key: tensor for key, tensor in snapshot.optimizer.items() if key != gone}
    write(tmp_path / "step-000001", snapshot._replace(optimizer=kept))
    with pytest.raises(UserError, match=f"has no exp_avg of {gone.rpartition('/')[0]}; resume from another checkpoint"):
        state._load_optimizer(state.SavedState(tmp_path / "step-000001"), *started("muon"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optimizer": "lionn"}, "unknown optim.optimizer 'lionn'; did you mean lion"),
        ({"optimizer": "kron"}, "unknown optim.optimizer 'kron'"),
        ({"optimizer": "lion", "betas": (0.9, 0.99)}, "optim.betas belongs to adam and adamw; for lion give optim.opt"),
        ({"optimizer": "sgd", "amsgrad": True}, "optim.amsgrad belongs to adam and adamw"),
        ({"options": {"lr": 1.0}}, "optim.options.lr: parameter groups have their own; give optim.lr"),
        ({"optimizer": "sgd", "options": {"momentun": 0.9}}, "sgd cannot be built with optim.options"),
        ({"options": {"momentum": 0.9}}, "adamw cannot be built with optim.options"),
    ],
)
def test_what_cannot_be_built_is_said_before_anything_else(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_optimizer(replace(OptimConfig(), **changes))


def test_options_reach_the_optimizer() -> None:
    config = OptimConfig(optimizer="sgd", options={"momentum": 0.5, "nesterov": True})
    check_optimizer(config)
    [group] = build_optimizer([{"params": [nn.Parameter(torch.ones(2))], "lr": 1.0}], **arguments(config)).param_groups
    assert (group["momentum"], group["nesterov"], group["base_lr"]) == (0.5, True, 1.0)


@contextmanager
def trained(shapes: Path, output: Path, *flags: str) -> Iterator[dict[str, Tensor]]:
    runs.run(shapes, output, *flags)
    yield load_file(output / "last" / "state" / "optimizer.safetensors") | load_file(
        output / "last" / "model" / "model.safetensors"
    )


def test_a_run_with_muon_stops_and_resumes(shapes: Path, tmp_path: Path) -> None:
    flags = ("--optim.optimizer", "muon", "--optim.options", "{momentum: 0.9}", "--train.max_steps", "4")
    with trained(shapes, tmp_path / "whole", *flags) as whole:
        pass
    runs.run(shapes, tmp_path / "parts", *flags, "--train.stop_after", "2")
    with trained(shapes, tmp_path / "parts", *flags) as parts:
        assert whole.keys() == parts.keys() and any("momentum_buffer" in key for key in whole)
        assert all(torch.equal(whole[key], parts[key]) for key in whole)


def test_the_list_says_whose_they_are() -> None:
    lines = list(optimizer_lines(argparse.Namespace(name="")))
    names = [line.split()[0] for line in lines]
    assert {"adamw", "lion", "muon", "lamb"} <= set(names) <= {*ADAM, *OPTIMIZERS}
    assert next(line for line in lines if line.startswith("adamw ")).split()[1] == "torch:"
