"""What a table needs to know of a recipe, read from its YAML layers without importing torch."""

from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import yaml

from amltrain.config.files import read_config_files
from amltrain.config.schema import COMBINED

SHAPES = {
    "refcoco": "refshapes",
    "refcoco+": "refshapes+",
    "refcocog": "refshapesg",
    "refcocog-google": "refshapesg",
    "grefcoco": "grefshapes",
}
"""The synthetic stand-in of each data set at the tiny scale."""
DEFAULT_EPOCHS = 50
"""`train.epochs` of a recipe that does not set it."""


class Recipe(NamedTuple):
    """name: of the shipped config, without `recipes/`. options: of the method, as the recipe sets them.

    epochs, max_steps: of its schedule; max_steps comes first. precision: of its training.
    """

    name: str
    model: str
    datasets: tuple[str, ...]
    method: str
    options: dict[str, Any]
    epochs: int
    max_steps: int | None
    stop_after: int | None
    precision: str
    output: str

    @property
    def tiny_model(self) -> str:
        """The small model of the same family, e.g. caris_tiny for caris_swin_base."""
        return f"{self.model.partition('_')[0]}_tiny"


@cache
def read_recipe(name: str) -> Recipe:
    """Read a recipe and its bases. Raises UserError if there is none of this name."""
    arguments = read_config_files(["--config", f"recipes/{name}"], {}).arguments
    values: dict[str, Any] = {}
    for layer in arguments[1::2]:
        values = _merged(values, yaml.safe_load(layer))
    datasets, method = values["data"]["datasets"], values["method"]
    train = values.get("train", {})
    return Recipe(
        name=name,
        model=values["model"]["name"],
        datasets=COMBINED if datasets == ["combined"] else tuple(datasets),
        method=method,
        options=values.get(method, {}),
        epochs=train.get("epochs", DEFAULT_EPOCHS),
        max_steps=train.get("max_steps"),
        stop_after=train.get("stop_after"),
        precision=train.get("mixed_precision", "no"),
        output=values["output"],
    )


def stand_ins(datasets: Sequence[str]) -> list[str]:
    """The synthetic data sets that stand for these."""
    return [SHAPES[name] for name in datasets]


def _merged(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Two layers of a config; groups are merged, anything else of the upper one wins."""
    result = dict(below)
    for key, value in above.items():
        both = isinstance(value, dict) and isinstance(result.get(key), dict)
        result[key] = _merged(result[key], value) if both else value
    return result
