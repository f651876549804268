"""The JSON Schema of config files, for editors: it completes keys and marks mistakes while a file is written."""

import json
from collections.abc import Sequence
from typing import Any

from amltrain.config.fields import ANY, POSITIVE, RANGES
from amltrain.config.files import BASE
from amltrain.config.parse import build_run_parser
from amltrain.config.sections import Sections

DIALECT = "$schema"


def config_schema(methods: Sections, augmentations: Sections, models: Sequence[str]) -> dict[str, Any]:
    """Build the schema from the config's types: all keys of a run, every method's and augmentation's section, `base`.

    models: the names that model.name may have. No key is required, because a file can be layered under another.
    """
    options = {name: kind.options(name) for kind in (methods, augmentations) for name in kind.names}
    schema: dict[str, Any] = json.loads(build_run_parser("amltrain train", options).get_completion_script("jsonschema"))
    for group in schema["properties"].values():
        _drop_dialects(group)
    schema["title"] = "amltrain config"
    schema["description"] = "A run of `amltrain train`, or a layer of one."
    name = {"type": "string"}
    schema["properties"][BASE] = {
        "description": "Files or shipped configs that this file starts from. Later ones win; this file wins over all.",
        "anyOf": [name, {"type": "array", "items": name, "minItems": 1}],
    }
    for key, (low, high) in RANGES.items():
        _limit(_find(schema, key), low, high)
    _find(schema, "method")["enum"] = sorted(methods.names)
    _find(schema, "model.name")["enum"] = sorted(models)
    _find(schema, "data.augment")["items"] = {"enum": sorted(augmentations.names)}
    return schema


def _drop_dialects(group: dict[str, Any]) -> None:
    """Leave `$schema` at the top alone."""
    properties = group.get("properties", {})
    properties.pop(DIALECT, None)
    for value in properties.values():
        _drop_dialects(value)


def _find(schema: dict[str, Any], key: str) -> dict[str, Any]:
    for part in key.split("."):
        schema = schema["properties"][part]
    return schema


def _limit(value: dict[str, Any], low: float, high: float) -> None:
    """Add a number's range; of a list, to its entries. JSON Schema ignores it for null."""
    if low == POSITIVE:
        limits: dict[str, Any] = {"exclusiveMinimum": 0}
    else:
        limits = {"minimum": low}
    if high != ANY:
        limits["maximum"] = high
    for item in _numbers(value):
        item.update(limits)


def _numbers(value: dict[str, Any]) -> list[dict[str, Any]]:
    """Every place in a value's schema that takes a number."""
    kinds = value.get("type", [])
    if {"number", "integer"} & set([kinds] if isinstance(kinds, str) else kinds):
        return [value]
    inner = [*value.get("anyOf", []), *value.get("prefixItems", [])]
    if isinstance(value.get("items"), dict):
        inner.append(value["items"])
    return [found for item in inner for found in _numbers(item)]
