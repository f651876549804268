"""The `kernels` package is called as it wants to be, and what it gives is used only if it is equal."""

import inspect
import warnings
from collections.abc import Callable

import pytest
import torch

from amltrain.models.layers import deformable, selective_scan
from amltrain.models.layers.hub_kernels import ASKED, TOLERANCE, HubKernel, equal_or_none, is_asked, load

KERNELS = (deformable.KERNEL, selective_scan.KERNEL)


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.repository)
def test_the_real_package_takes_the_call(kernel: HubKernel) -> None:
    """Its own check of arguments passes and the Hub is asked: off-line, that is where it ends."""
    kernels = pytest.importorskip("kernels")
    inspect.signature(kernels.get_kernel).bind(kernel.repository, version=kernel.version)
    wanted = f"ersion {kernel.version} of '{kernel.repository}' is not available in the local cache"
    with pytest.raises(ValueError, match=wanted):
        load(kernel)


def test_the_versions_are_those_that_transformers_uses() -> None:
    from transformers.integrations import hub_kernels

    source = inspect.getsource(hub_kernels).replace(" ", "").replace("\n", "")
    for repository, version in KERNELS:
        place = source.index(f'repo_id="{repository}"')
        assert f"version={version}," in source[place : place + 200], repository


def test_only_where_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(ASKED, raising=False)
    assert not is_asked(torch.device("cuda"))
    monkeypatch.setenv(ASKED, "1")
    assert is_asked(torch.device("cuda")) and not is_asked(torch.device("cpu"))


def double(x: float) -> float:
    return 2 * x


@pytest.mark.parametrize(
    ("difference", "message"),
    [
        (lambda made: 10 * TOLERANCE, "it is not used: it differs by 1.0e-02"),
        (lambda made: float("nan"), "it is not used: it differs by nan"),
        (lambda made: 1 / 0, "it is not used: .*division by zero"),
    ],
)
def test_what_differs_is_one_warning(difference: Callable[[object], float], message: str) -> None:
    with pytest.warns(UserWarning, match=message):
        assert equal_or_none("it", lambda: double, difference) is None


def test_what_is_equal_is_used() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert equal_or_none("it", lambda: double, lambda made: abs(made(2.0) - 4.0)) is double
