"""Every small model's bf16 step on a card: no synchronisation, no wrong device, no lost gradient, within its budget."""

from typing import Any

import pytest

from tests.models.test_registry import TINY
from tests.null_gpu.budgets import FULL_SIZE, METHODS, UPDATE, excess, measure, read_budgets
from tests.null_gpu.device import NullGPU

BUDGETS = read_budgets()


@pytest.fixture(scope="module")
def tiny(null_gpu: NullGPU, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """All small models and methods, in one process."""
    return measure(null_gpu, tmp_path_factory.mktemp("tiny"), "tiny", *METHODS)


@pytest.fixture(scope="module")
def full(null_gpu: NullGPU, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return measure(null_gpu, tmp_path_factory.mktemp("full"), "full", *FULL_SIZE)


def test_faults_are_seen(tiny: dict[str, Any]) -> None:
    """The same guard stops what it is there for."""
    faults = tiny["faults"]
    for name in ("value read", "copy from the host", "mask as index"):
        assert "synchronizing" in faults[name], name
    assert "same device" in faults["wrong device"]
    assert faults["nothing"] == ""


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", TINY)
def test_a_step(name: str, method: str, tiny: dict[str, Any]) -> None:
    result = tiny["measured"][name][method]
    assert result["error"] == ""
    assert result["without_gradient"] == []


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", TINY)
def test_a_step_stays_in_its_budget(name: str, method: str, tiny: dict[str, Any]) -> None:
    assert (name, method) in BUDGETS, f"{name} has no budget: run `python -m tests.null_gpu.budgets`"
    over = excess(tiny["measured"][name][method], BUDGETS[name, method])
    assert not over, f"{name} {method} at torch {tiny['torch']}: {', '.join(over)}; {UPDATE}"


@pytest.mark.parametrize("name", FULL_SIZE)
def test_a_full_size_step_stays_in_its_budget(name: str, full: dict[str, Any]) -> None:
    result = full["measured"][name]["supervised"]
    assert result["error"] == ""
    assert result["without_gradient"] == []
    over = excess(result, BUDGETS[name, "supervised"])
    assert not over, f"{name} at torch {full['torch']}: {', '.join(over)}; {UPDATE}"


def test_the_table_names_what_is_measured() -> None:
    assert set(BUDGETS) == {(name, method) for name in TINY for method in METHODS} | {
        (name, "supervised") for name in FULL_SIZE
    }


def test_an_excess_is_named() -> None:
    budget = {"kernels": 1000.0, "casts": 300.0, "float32": 0.0, "peak": 500.0}
    assert excess({"kernels": 1090, "casts": 200, "float32": 0.005, "peak": 545}, budget) == []
    assert excess({"kernels": 1200, "casts": 300, "float32": 0.0, "peak": 500}, budget) == [
        "kernels 1200, budget 1000 (+20%)"
    ]
    assert len(excess({"kernels": 1101, "casts": 331, "float32": 0.02, "peak": 551}, budget)) == 4
