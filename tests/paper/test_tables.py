"""The definition of the paper's tables is complete, and agrees with the recipes and with docs/paper.md."""

from pathlib import Path

import pytest

from amltrain.commands.train import read_run
from amltrain.config.files import find_config
from amltrain.errors import UserError
from amltrain.evaluation.metrics import list_metrics
from amltrain.methods.aml.recorder import STATISTICS
from amltrain.paper.page import updated
from amltrain.paper.plan import SHAPES, Run, read_recipe
from amltrain.paper.tables import BY_NAME, TABLES, find_tables
from amltrain.paper.values import READERS

RECIPES = sorted({recipe for table in TABLES for recipe in table.recipes()})
NUMBERED = [*(1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 13, 14, 15, 16, 17, 18)]
"""Tables of the paper that we know something of."""
SPECIAL = [
    *("paper/refcoco+_aml_selection_patch_rho_0.5", "paper/combined_aml", "paper/refcoco_aml_10_of_50_epochs"),
    *("paper/refcocog_released", "rela/grefcoco_5k_aml", "lavt/refcocog", "detris/refcoco+_aml", "cris/refcoco"),
]
"""One recipe of every form."""


def test_every_table_and_figure_of_the_paper_has_an_entry() -> None:
    figures = {"figure4a", "figure4b", "figure5", "figure6"}
    wanted = {f"table{n}" for n in NUMBERED} | figures | {"main", "combined", "gres"}
    assert wanted <= BY_NAME.keys()
    assert [table.name for table in find_tables(["table17", "table4"])] == ["table4"]
    assert find_tables(["all"]) == list(TABLES)
    with pytest.raises(UserError, match="unknown table 'tabel4'; did you mean table4"):
        find_tables(["tabel4"])


def test_every_recipe_exists_and_has_a_small_model() -> None:
    for name in RECIPES:
        recipe = read_recipe(name)
        find_config(f"models/{recipe.tiny_model}", name)
        assert set(recipe.datasets) <= SHAPES.keys()
    assert len(RECIPES) > 50


@pytest.mark.parametrize("name", SPECIAL)
def test_a_recipe_is_read_as_train_reads_it(name: str) -> None:
    recipe, run = read_recipe(name), read_run(["--config", f"recipes/{name}"])
    assert (recipe.model, recipe.method, recipe.output) == (run.model.name, run.method, run.output)
    assert list(recipe.datasets) == run.data.datasets
    assert (recipe.max_steps, recipe.stop_after) == (run.train.max_steps, run.train.stop_after)
    assert recipe.epochs == run.train.epochs
    assert recipe.precision == (run.train.mixed_precision or "no")
    options = {k: v for k, v in vars(run.method_options).items() if v is not None} if recipe.options else {}
    assert recipe.options == options


@pytest.mark.parametrize("table", TABLES, ids=lambda table: table.name)
def test_rows_name_measures_that_their_kind_can_read(table) -> None:
    assert table.rows
    assert len({(row.label, measure) for row in table.rows for measure in row.cells}) == sum(
        len(row.cells) for row in table.rows
    )
    for row in table.rows:
        assert row.kind in READERS
        for measure in row.cells:
            if row.kind in ("scores", "robustness", "occlusion"):
                split, metric = measure.split(", ")[0].split("/")
                assert metric in list_metrics()
                dataset, _, name = split.partition(":")
                assert name in ("val", "testA", "testB", "test") and dataset in SHAPES
            elif row.kind == "alignment":
                name, epoch = measure.split(", epoch ")
                assert name in {*STATISTICS, "score_std"}
                assert row.run.checkpoints and int(epoch) <= row.run.stop_after


def test_published_numbers_are_those_of_the_recipes() -> None:
    """Every published score of CARIS and AML stands in the header of its recipe."""
    checked = 0
    for table in TABLES:
        for row in table.rows_of("scores"):
            if not row.run.recipe.startswith("paper/") or row.run.stop_after:
                continue
            found = find_config(f"recipes/{row.run.recipe}", "test")
            header = found.path.read_text().split("\nbase:" if found.variant is None else f"\n  {found.variant}:\n")[0]
            for measure, value in row.cells.items():
                if value is not None:
                    assert f"{value:.2f}" in header, f"{row.run.recipe}: {measure} {value}"
                    checked += 1
    assert checked > 60


def test_runs_are_shared_between_tables() -> None:
    runs = [run for table in TABLES for run in table.runs()]
    assert len(set(runs)) < len(runs)
    assert runs.count(Run("paper/refcoco+_aml")) > 5


def test_the_page_is_made_from_the_definition(repository: Path) -> None:
    text = (repository / "docs" / "paper.md").read_text(encoding="utf-8")
    assert text == updated(text), "run: python -m amltrain.paper.page docs/paper.md"
    for table in TABLES:
        assert f"`amltrain paper reproduce {table.name}`" in text
