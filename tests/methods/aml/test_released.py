"""Preset `released` against everything recorded from the public code: scores, masks, a whole training step."""

import json

import pytest
from safetensors.torch import load_file

from tests.parity import compare
from tests.parity.amlris import build_recorded_task, compare_case


@pytest.fixture(scope="module")
def recorded(shared_dir):
    folder = shared_dir / "goldens" / "amlris_release"
    config = json.loads((folder / "components.json").read_text())["config"]
    weights = compare.official_weights(load_file(shared_dir / "goldens" / "caris" / "tiny.safetensors"))
    return folder, config, weights


def check(rows: list[compare.Row]) -> None:
    assert all(row.passed for row in rows), compare.table([row for row in rows if not row.passed])


def test_components(recorded) -> None:
    folder, config, weights = recorded
    rows = compare_case(load_file(folder / "components.safetensors"), config, weights)
    assert len(rows) == 30
    check(rows)


def test_training_step(recorded) -> None:
    folder, config, weights = recorded
    rows = compare_case(load_file(folder / "train_step.safetensors"), config, weights)
    assert len(rows) == 38
    check(rows)


def test_one_backward_leaves_the_releases_gradients(recorded) -> None:
    """The official code runs two backward passes; ours is one, as engines that step on every backward need."""
    folder, config, weights = recorded
    step = load_file(folder / "train_step.safetensors")
    task, renamed = build_recorded_task(config, weights, step)
    result = task(compare.default_batch(step))
    assert not any(value.requires_grad for name, value in result.items() if name != "loss")
    result["loss"].backward()
    parameters = dict(task.model.named_parameters())
    check(
        [
            compare.row(name, parameters[renamed[name.removeprefix("grad_total.")]].grad, value, 5e-4, relative=True)
            for name, value in step.items()
            if name.startswith("grad_total.")
        ]
    )
    assert all(p.grad is None for p in task.scorer.parameters())
