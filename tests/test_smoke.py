"""What must hold before anything else: every module imports, every model takes a step, a killed run resumes exactly."""

import importlib
from functools import partial
from pathlib import Path

import pytest
import torch

from amltrain.losses import create_loss
from amltrain.methods.base import build_method
from amltrain.models import create_model, list_models, model_info
from amltrain.training.optim import build_optimizer
from tests.models.test_registry import make_batch
from tests.training import runs, sabotage

PACKAGE = Path(__file__).resolve().parents[1] / "amltrain"
MODULES = sorted(
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")
    for path in PACKAGE.rglob("*.py")
    if path.name != "__main__.py"
)
TINY = [name for name in list_models() if name.endswith("_tiny") and "swin" not in name]


def test_every_module_is_imported() -> None:
    assert len(MODULES) > 150
    for module in MODULES:
        assert importlib.import_module(module).__name__ == module


@pytest.mark.parametrize("name", TINY)
def test_every_model_takes_a_step_that_changes_what_it_trains(name: str) -> None:
    torch.manual_seed(0)
    info = model_info(name)
    method = build_method("supervised", create_model(name), create_loss(info.loss, **info.loss_kwargs)).train()
    optimizer = build_optimizer(
        method.param_groups(1e-3, 0.0), "adamw", lr=1e-3, betas=(0.9, 0.999), eps=1e-8, amsgrad=False
    )
    before = {key: value.clone() for key, value in method.named_parameters() if value.requires_grad}
    loss = method(make_batch(name, info.preprocess.size, info.preprocess.size))["loss"]
    loss.backward()
    optimizer.step()
    assert loss.isfinite()
    changed = [key for key, value in method.named_parameters() if key in before and not value.equal(before[key])]
    assert len(changed) > 0.8 * len(before)


def test_a_run_that_was_asked_to_stop_ends_as_one_that_was_not(shapes: Path, tmp_path: Path) -> None:
    extra = ("--train.max_steps", "4", "--evaluation.every_steps", "4")
    runs.run(shapes, tmp_path / "whole", *extra)
    runs.finished(shapes, tmp_path / "cut", *extra, before=partial(sabotage.ask_to_stop, 3), expected=75)
    runs.finished(shapes, tmp_path / "cut", *extra)
    assert runs.same_weights(tmp_path / "cut", tmp_path / "whole")
    assert runs.logged(tmp_path / "cut") == runs.logged(tmp_path / "whole")
    assert "oIoU" in (tmp_path / "cut" / "results.json").read_text()
