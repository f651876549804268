"""A file imports only from lower layers, and no import circle exists, type-only imports included."""

import ast
from functools import cache
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "amltrain"
LAYERS = [
    {
        "errors",
        "environment",
        "records",
        "randomness",
        "files",
        "config",
        "registry",
        "run_folder",
        "network",
        "matching",
        "frames",
    },
    {"distributed"},
    {"data", "models", "losses", "instance_loss"},
    {"methods"},
    {"evaluation"},
    {"hub"},
    {"report"},
    {"inference"},
    {"checkpoints"},
    {"training"},
    {"api"},
    {"choices", "finetune"},
    {"paper", "commands", "__main__", "cli", "completion"},
]
"""Folders and modules of the package, lowest layer first. data, models and losses of one layer may not import each
other, because each of them has to be usable without the others."""
INDEPENDENT = {"data", "models", "losses"}
FILES = {
    ".".join(("amltrain", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}


def part_of(module: str) -> str:
    return module.split(".")[1]


def layer_of(module: str) -> int:
    return next(level for level, parts in enumerate(LAYERS) if part_of(module) in parts)


@cache
def imports(module: str) -> frozenset[str]:
    """Modules of the package that a file imports, also inside functions and under TYPE_CHECKING."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(FILES[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "amltrain":
            submodules = {f"{node.module}.{alias.name}" for alias in node.names} & FILES.keys()
            found |= submodules or {node.module}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name in FILES}
    return frozenset(found - {module, "amltrain"})


@pytest.mark.parametrize("module", sorted(FILES.keys() - {"amltrain"}))
def test_imports_go_down(module: str) -> None:
    for imported in imports(module):
        if part_of(imported) == part_of(module):
            continue
        assert layer_of(imported) <= layer_of(module), f"{module} imports {imported} from a higher layer"
        between = {part_of(imported), part_of(module)}
        assert not between <= INDEPENDENT, f"{module} imports {imported}; these packages must stay independent"


def test_no_import_circle() -> None:
    done: set[str] = set()

    def visit(module: str, trail: tuple[str, ...]) -> None:
        assert module not in trail, f"import circle: {' -> '.join([*trail[trail.index(module) :], module])}"
        if module in done:
            return
        for imported in imports(module):
            visit(imported, (*trail, module))
        done.add(module)

    for module in FILES.keys() - {"amltrain"}:
        visit(module, ())


def test_every_part_has_a_layer() -> None:
    for module in FILES.keys() - {"amltrain"}:
        assert layer_of(module) >= 0


def test_circle_and_upward_imports_are_found() -> None:
    """The helpers above see what they should: a known import and a known layer order."""
    assert "amltrain.errors" in imports("amltrain.config.files")
    assert layer_of("amltrain.training.trainer") > layer_of("amltrain.evaluation.metrics") > layer_of("amltrain.data")
