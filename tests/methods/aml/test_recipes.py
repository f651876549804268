"""The paper's recipes: each trains full-size CARIS and asks for what that model can do."""

from functools import cache
from pathlib import Path

import pytest
import torch

from amltrain.config.parse import parse_config
from amltrain.config.schema import RunConfig
from amltrain.methods.aml.presets import resolve
from amltrain.models import create_model
from amltrain.tasks import build_scorer, check_model

RECIPES = sorted((Path(__file__).parents[2] / "configs" / "recipes" / "paper").glob("*.yaml"))


@pytest.fixture(scope="module")
def caris():
    with torch.device("meta"):
        return create_model("caris_swin_base")


@cache
def parse(path: Path) -> RunConfig:
    return parse_config(["--config", str(path)])


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipe(recipe: Path, caris) -> None:
    run = parse(recipe)
    assert run.model.name == "caris_swin_base"
    assert ("aml" in recipe.stem or "released" in recipe.stem) == run.aml.enabled
    if run.aml.enabled:
        chosen = resolve(run.aml)
        check_model(caris, chosen)
        build_scorer(caris, chosen)


def test_there_is_one_for_every_option() -> None:
    runs = [resolve(parse(path).aml) for path in RECIPES]
    assert {r.features for r in runs} == {"early", "late", "pred"}
    assert {r.level for r in runs} == {"image", "feature", "random"}
    assert {r.dim for r in runs} == {1024, 2048, 4096}
    assert {r.tau for r in runs} == {0.0, 0.2, 0.3, 0.4}
    assert {r.projection for r in runs} == {"random", "learnable", "linear"}  # CARIS's widths rule out identity
