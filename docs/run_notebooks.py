"""Execute the notebooks of the documentation and keep their outputs: `python docs/run_notebooks.py [NAME ...]`.

A notebook records the SHA-256 of the cells that were executed, and a test compares it: changed cells need a new run.
"""

import base64
import hashlib
import io
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "docs" / "notebooks"


def digest(notebook: Any) -> str:
    """SHA-256 of a notebook's code cells."""
    code = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    return hashlib.sha256("\n\n".join(code).encode()).hexdigest()


def execute(path: Path) -> None:
    """Run a notebook from top to bottom in an empty folder, and write it back with its outputs."""
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(path, 4)
    with tempfile.TemporaryDirectory() as folder:
        resources = {"metadata": {"path": folder}}
        NotebookClient(notebook, timeout=3600, resources=resources, coalesce_streams=True).execute()
        for cell in notebook.cells:
            cell.metadata.pop("execution", None)  # times of day
            if cell.cell_type == "code":
                cell.outputs = [tidied(output, folder) for output in cell.outputs if output.get("name") != "stderr"]
    notebook.metadata["language_info"] = {"name": "python"}
    notebook.metadata["amltrain"] = {"executed": digest(notebook)}
    nbformat.write(notebook, path)


def tidied(output: Any, folder: str) -> Any:
    """An output without the names of the folders that it was made in, its picture in few colours."""
    if "image/png" in output.get("data", {}):
        output["data"]["image/png"] = smaller(output["data"]["image/png"])
    for values, key in ((output, "text"), (output.get("data", {}), "text/plain")):
        if isinstance(values.get(key), str):
            values[key] = values[key].replace(f"{folder}/", "").replace(f"{ROOT}/", "")
    return output


def smaller(picture: str) -> str:
    """A PNG in base64 with 64 colours."""
    from PIL import Image

    out = io.BytesIO()
    with Image.open(io.BytesIO(base64.b64decode(picture))) as image:
        image.convert("RGB").quantize(64).save(out, "PNG", optimize=True)
    return base64.b64encode(out.getvalue()).decode("ascii")


def main(names: list[str]) -> None:
    """Execute the named notebooks, all of them by default."""
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    for path in sorted(FOLDER.glob("*.ipynb")):
        if not names or path.stem in names:
            execute(path)
            print(f"{path.relative_to(ROOT)}: {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main(sys.argv[1:])
