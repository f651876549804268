"""The paper's recipes: each trains full-size CARIS and asks for what that model can do."""

from functools import cache

import pytest
import torch

from amltrain.commands.train import read_run
from amltrain.config.files import shipped_configs
from amltrain.config.schema import RunConfig
from amltrain.methods.aml.masker import build_scorer, check_model
from amltrain.methods.aml.options import resolve
from amltrain.models import create_model

RECIPES = [name for name in shipped_configs() if name.startswith("recipes/paper/")]


@pytest.fixture(scope="module")
def caris():
    with torch.device("meta"):
        return create_model("caris_swin_base")


@cache
def parse(name: str) -> RunConfig:
    return read_run(["--config", name])


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipe(recipe: str, caris) -> None:
    run = parse(recipe)
    assert run.model.name == "caris_swin_base"
    assert run.output == recipe.replace("recipes/", "runs/")
    assert ("aml" in recipe or "released" in recipe) == (run.method == "aml")
    if run.method == "aml":
        chosen = resolve(run.method_options)
        check_model(caris, chosen)
        build_scorer(caris, chosen)


def test_there_is_one_for_every_option() -> None:
    runs = [resolve(run.method_options) for run in map(parse, RECIPES) if run.method == "aml"]
    assert {r.features for r in runs} == {"early", "late", "pred"}
    assert {r.level for r in runs} == {"image", "feature", "random"}
    assert {r.dim for r in runs} == {1024, 2048, 4096}
    assert {r.tau for r in runs} == {0.0, 0.2, 0.3, 0.4}
    assert {r.projection for r in runs} == {"random", "learnable", "linear"}  # CARIS's widths rule out identity
