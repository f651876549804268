"""Every registered method keeps the contract of methods/base.py."""

from dataclasses import fields, is_dataclass

import pytest
import torch

from amltrain.config.parse import find_option
from amltrain.errors import UserError
from amltrain.losses import create_loss
from amltrain.methods.base import Method, build_method
from amltrain.models import create_model, model_info
from amltrain.records import Vocabulary
from amltrain.registry import METHODS
from tests.methods.aml.test_method import make_batch

WORDS = Vocabulary(size=500, padding=0, mask=103, special=(0, 100, 101, 102, 103))


MODELS = {"contrastive": "dual_tiny"}
"""Models of methods that do not train the usual one."""


def build(name: str) -> Method:
    torch.manual_seed(0)
    model = MODELS.get(name, "caris_tiny")
    info = model_info(model)
    return build_method(name, create_model(model), create_loss(info.loss, **info.loss_kwargs), None, WORDS)


@pytest.mark.parametrize("name", METHODS.names())
def test_one_step_trains_every_parameter_and_repeats(name: str) -> None:
    method, batch = build(name).train(), make_batch()
    lines = method.setup(iter([batch]))
    assert all(isinstance(line, str) for line in lines)
    assert method.before_step(0, [batch]) == []
    result = method(batch)
    result["loss"].backward()
    assert not any(value.requires_grad for key, value in result.items() if key != "loss")
    trained = [p for group in method.param_groups(1e-3, 0.01) for p in group["params"]]
    assert trained and all(p.grad is not None and p.grad.isfinite().all() for p in trained)
    again = build(name).train()
    again.load_state_dict(method.state_dict())
    assert torch.equal(again(batch)["loss"], result["loss"])


@pytest.mark.parametrize("name", METHODS.names())
def test_it_describes_itself_and_exports_only_the_model(name: str) -> None:
    method = build(name)
    assert method.summary().split(",")[0] == name
    assert METHODS[name].details.summary
    assert method.model.state_dict().keys() == create_model(MODELS.get(name, "caris_tiny")).state_dict().keys()


@pytest.mark.parametrize("name", METHODS.names())
def test_options_have_defaults_and_help(name: str) -> None:
    kind = METHODS.options(name)
    assert is_dataclass(kind)
    kind()
    assert kind is METHODS[name].options
    assert all(field.name.isidentifier() for field in fields(kind))


def test_an_unknown_method_names_the_close_match() -> None:
    with pytest.raises(UserError, match=r"unknown method 'maskriss'; did you mean maskris"):
        METHODS["maskriss"]


def test_an_option_is_found_in_the_section_that_has_it() -> None:
    assert find_option("tau") == ["aml.tau"]
    assert find_option("text_ratio") == ["maskris.text_ratio"]
