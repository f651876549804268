"""A file imports only from lower layers, and the folders of layer 1 do not import each other."""

import ast
from pathlib import Path

import pytest

LAYERS = [
    {"errors", "records", "randomness", "config", "config_files", "ranges"},
    {"data", "models", "aml", "losses", "visualize"},
    {"tasks", "pretrained"},
    {"evaluation", "training", "predictor", "official", "hub", "model_card"},
    {"commands", "cli"},
]
ALLOWED_SIDEWAYS = {
    ("training", "evaluation"),
    ("predictor", "evaluation"),
    ("evaluation", "predictor"),
    ("model_card", "evaluation"),
    ("hub", "evaluation"),
    ("hub", "model_card"),
    ("training", "hub"),
}
PACKAGE = Path(__file__).resolve().parents[1] / "amltrain"


def layer_of(part: str) -> int:
    return next(level for level, parts in enumerate(LAYERS) if part in parts)


def imports(path: Path) -> set[str]:
    """First-level parts of the package that a file imports, also inside functions."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("amltrain."):
            names.add(node.module.split(".")[1])
        elif isinstance(node, ast.Import):
            names.update(alias.name.split(".")[1] for alias in node.names if alias.name.startswith("amltrain."))
    return names


FILES = sorted(p for p in PACKAGE.rglob("*.py") if p != PACKAGE / "__init__.py")


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_down(path: Path) -> None:
    own = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    for part in imports(path) - {own}:
        sideways = layer_of(part) == layer_of(own) and layer_of(own) > 1
        allowed = layer_of(part) < layer_of(own) or (sideways and (own, part) in ALLOWED_SIDEWAYS)
        allowed = allowed or (layer_of(own) == layer_of(part) == 0)
        assert allowed, f"{own} imports {part}"


def test_every_part_has_a_layer() -> None:
    for path in FILES:
        assert layer_of(path.relative_to(PACKAGE).parts[0].removesuffix(".py")) >= 0
