"""The tables that the site takes from the code."""

import importlib.util
import json
import re
from pathlib import Path
from types import ModuleType, SimpleNamespace

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
    filled = {name: hooks.on_page_markdown(text, page=SimpleNamespace(meta={})) for name, text in pages.items()}
    assert not [name for name, text in filled.items() if "<!-- table" in text]
    assert all(f"`{key}`" in filled["config"] for key, own in iter_keys(RunConfig) if "low" in own.metadata)
    assert "method_options" not in filled["config"] and "None" not in filled["config"]
    assert "| `paper/refcoco_aml` | val/testA/testB: mIoU 77.89/79.53/74.99" in filled["zoo"]
    assert filled["zoo"].count("not run") > 60
    assert all(name in filled["models"] for name in list_models())
    assert "`aml.tau` | `null`" in filled["methods"] and "It has no options." in filled["methods"]
    assert "`mosaic.grids` | `[4]`" in filled["augmentations"]


def test_a_page_without_sections_leaves_its_tables_the_space_of_the_contents(hooks: ModuleType) -> None:
    wide, sections = SimpleNamespace(meta={}), SimpleNamespace(meta={})
    hooks.on_page_markdown("# Models\n\n| a |\n", page=wide)
    hooks.on_page_markdown("# Data\n\n## Own\n", page=sections)
    assert wide.meta == {"hide": ["toc"]} and sections.meta == {}


def test_links_of_notebooks_lead_to_pages(hooks: ModuleType, repository: Path) -> None:
    notebook = SimpleNamespace(file=SimpleNamespace(src_uri="notebooks/aml_in_pictures.ipynb"))
    page = SimpleNamespace(file=SimpleNamespace(src_uri="aml.md"))
    link = '<a href="../aml.md#options">AML</a>'
    assert hooks.on_page_content(link, page=notebook) == '<a href="../../aml/#options">AML</a>'
    assert hooks.on_page_content(link, page=page) == link
    for path in (repository / "docs/notebooks").glob("*.ipynb"):
        text = "".join(line for cell in json.loads(path.read_text())["cells"] for line in cell["source"])
        for target in re.findall(r"\]\(([^)#]+)", text):
            assert (path.parent / target).is_file(), f"{path.name}: {target}"


def test_every_page_is_in_the_contents(repository: Path) -> None:
    contents = (repository / "mkdocs.yml").read_text()
    pages = [path.relative_to(repository / "docs").as_posix() for path in (repository / "docs").rglob("*.md")]
    assert [page for page in pages if f": {page}\n" not in contents] == []
