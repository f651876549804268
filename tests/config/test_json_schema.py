"""The JSON Schema of config files takes every shipped file and marks mistakes."""

from typing import Any

import pytest
import yaml

from amltrain.config.files import shipped_configs
from amltrain.config.parse import config_schema

jsonschema = pytest.importorskip("jsonschema")


@pytest.fixture(scope="module")
def schema() -> Any:
    schema = config_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


def test_every_shipped_config_is_valid(schema: Any) -> None:
    files = {name: found.path for name, found in shipped_configs().items() if not name.startswith("accelerate/")}
    assert len(files) > 100
    for name, path in files.items():
        errors = [error.message for error in schema.iter_errors(yaml.safe_load(path.read_text()))]
        assert not errors, f"{name}: {errors}"


@pytest.mark.parametrize(
    "text",
    [
        "optim: {lrr: 1.0}",
        "optim: {lr: -1.0}",
        "optim: {betas: [0.9, 1.5]}",
        "optim: {clip_norm: 0}",
        "train: {epochs: 0}",
        "evaluation: {protocol: {threshold: 2}}",
        "seed: many",
        "method: aml2",
        "model: {name: caris_huge}",
        "data: {augment: [mozaic]}",
        "aml: {preset: papr}",
        "base: []",
        "model: caris_tiny",
    ],
)
def test_mistakes_are_marked(schema: Any, text: str) -> None:
    assert list(schema.iter_errors(yaml.safe_load(text)))


@pytest.mark.parametrize(
    "text",
    [
        "base: quickstart",
        "base: [models/caris_tiny, mine.yaml]",
        "optim: {clip_norm: null, betas: [0.9, 0.99]}",
        "train: {max_steps: null, mixed_precision: bf16}",
        "evaluation: {protocol: {threshold: 0.35}}",
        "$schema: amltrain.schema.json",
    ],
)
def test_what_a_run_takes_is_valid(schema: Any, text: str) -> None:
    assert not list(schema.iter_errors(yaml.safe_load(text)))
