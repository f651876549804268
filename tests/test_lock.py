"""uv.lock belongs to pyproject.toml as it is."""

import re
from pathlib import Path

import pytest

tomllib = pytest.importorskip("tomllib")


def test_the_lock_has_every_declared_dependency(repository: Path) -> None:
    """Run `make lock` if this fails."""
    project = tomllib.loads((repository / "pyproject.toml").read_text())["project"]
    packages = tomllib.loads((repository / "uv.lock").read_text())["package"]
    [own] = [package for package in packages if package["name"] == project["name"]]
    locked = {(entry["name"], entry.get("specifier", "")) for entry in own["metadata"]["requires-dist"]}
    extras = [text for texts in project["optional-dependencies"].values() for text in texts]
    for text in [*project["dependencies"], *extras]:
        name, specifier = re.match(r"([\w.-]+)(?:\[[^]]*\])?(.*)", text).groups()
        name = name.replace("_", "-").lower()
        wanted = set(specifier.replace(" ", "").split(","))
        assert any((name, wanted) == (n, set(s.replace(" ", "").split(","))) for n, s in locked), text


def test_the_lock_names_the_public_index_only(repository: Path) -> None:
    text = (repository / "uv.lock").read_text()
    assert set(re.findall(r'"(https?://[^/"]+)', text)) == {"https://pypi.org", "https://files.pythonhosted.org"}
    assert "file://" not in text
