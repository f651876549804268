"""The notebooks of the documentation run from top to bottom, at small sizes, as a reader runs them."""

import importlib.util
import os
from pathlib import Path

import pytest

nbclient = pytest.importorskip("nbclient")
nbformat = pytest.importorskip("nbformat")
pytest.importorskip("ipykernel")

FOLDER = Path(__file__).resolve().parents[2] / "docs" / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
LARGEST = 300_000
"""Bytes of a notebook with its outputs."""
OLD_CALLS = ("amltrain.commands", "amltrain.training.trainer")
"""What a notebook must not call: commands' insides."""


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


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_its_outputs_are_those_of_its_cells(path: Path, repository: Path) -> None:
    """`python docs/run_notebooks.py` makes them."""
    notebook = nbformat.read(path, 4)
    spec = importlib.util.spec_from_file_location("run_notebooks", repository / "docs" / "run_notebooks.py")
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    assert notebook.metadata["amltrain"]["executed"] == script.digest(notebook), "run python docs/run_notebooks.py"
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell.outputs]
    assert any("image/png" in output.get("data", {}) or "text/markdown" in output.get("data", {}) for output in outputs)
    assert not any(output.output_type == "error" for output in outputs)
    assert "/tmp/" not in path.read_text() and "/home/" not in path.read_text()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_starts_on_colab_and_goes_through_the_public_calls(path: Path) -> None:
    code = [cell.source for cell in nbformat.read(path, 4).cells if cell.cell_type == "code"]
    assert "%pip install" in code[0] and "import amltrain" in code[0]
    assert not [call for call in OLD_CALLS if call in "".join(code)]


def test_there_are_four() -> None:
    assert {path.stem for path in NOTEBOOKS} == {"quickstart", "own_data", "aml_in_pictures", "compare_methods"}
