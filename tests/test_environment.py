"""--device: what is here is taken, what is not is rejected in one line."""

import pytest
import torch

from amltrain import environment as device
from amltrain.environment import available_devices, choose_device
from amltrain.errors import UserError


def test_a_device_that_is_here() -> None:
    assert choose_device("cpu") == torch.device("cpu")
    assert str(choose_device(None)) in available_devices()


def test_a_device_that_is_not_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "available_devices", lambda: ["cpu", "cuda", "cuda:0"])
    assert choose_device(None) == torch.device("cuda")
    for name in ("foo", "cuda:1", "", "meta"):
        with pytest.raises(UserError, match=f"there is no device {name} here; there is cpu, cuda, cuda:0"):
            choose_device(name)
