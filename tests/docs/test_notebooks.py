"""The notebooks of the documentation run from top to bottom, at small sizes, as a reader runs them."""

import os
from pathlib import Path

import pytest

nbclient = pytest.importorskip("nbclient")
nbformat = pytest.importorskip("nbformat")
pytest.importorskip("ipykernel")

FOLDER = Path(__file__).resolve().parents[2] / "docs" / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
LARGEST = 400_000
"""Bytes of a notebook with its outputs."""


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_runs(path: Path, tmp_path: Path, repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if path.stem == "own_data":
        pytest.importorskip("all_minilm_l6_v2", reason="its pretrained encoders are not installed")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(repository), *filter(None, [os.environ.get("PYTHONPATH")])]))
    for name, value in {"SCENES": 32, "IMAGES": 40, "STEPS": 4}.items():
        monkeypatch.setenv(f"NOTEBOOK_{name}", str(value))
    notebook = nbformat.read(path, 4)
    nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert any({"image/png", "text/markdown"} & output.get("data", {}).keys() for output in outputs)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_is_small_and_on_the_site(path: Path, repository: Path) -> None:
    nbformat.validate(nbformat.read(path, 4))
    assert path.stat().st_size < LARGEST
    assert f"notebooks/{path.name}" in (repository / "mkdocs.yml").read_text()


def test_there_are_four() -> None:
    assert {path.stem for path in NOTEBOOKS} == {"quickstart", "own_data", "aml_in_pictures", "compare_methods"}
