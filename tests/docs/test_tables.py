"""The tables that the site takes from the code."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from amltrain.config.fields import iter_keys
from amltrain.config.schema import RunConfig
from amltrain.models import list_models


@pytest.fixture(scope="module")
def hooks(repository: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("hooks", repository / "docs" / "hooks.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_page_gets_its_tables(hooks: ModuleType, repository: Path) -> None:
    pages = {path.stem: path.read_text() for path in (repository / "docs/reference").glob("*.md")}
    pages["zoo"] = (repository / "docs/zoo.md").read_text()
    filled = {name: hooks.on_page_markdown(text) for name, text in pages.items()}
    assert not [name for name, text in filled.items() if "<!-- table" in text]
    assert all(f"`{key}`" in filled["config"] for key, own in iter_keys(RunConfig) if "low" in own.metadata)
    assert "method_options" not in filled["config"] and "None" not in filled["config"]
    assert "| `paper/refcoco_aml` | val/testA/testB: mIoU 77.89/79.53/74.99" in filled["zoo"]
    assert filled["zoo"].count("not run") > 60
    assert all(name in filled["models"] for name in list_models())
    assert "`aml.tau` | `null`" in filled["methods"] and "It has no options." in filled["methods"]
    assert "`mosaic.grids` | `[4]`" in filled["augmentations"]
