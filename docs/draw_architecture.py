"""Draw `docs/images/architecture.svg` from the imports of the package: `python docs/draw_architecture.py`.

One box per folder or module of the package, in the layers of `tests/test_layering.py`; an arrow to every layer below
that a box imports from. A test compares the file with what this draws.
"""

import ast
import importlib.util
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PICTURE = ROOT / "docs" / "images" / "architecture.svg"
WIDTH, ROW, BOX = 1060, 92, 44


def layers() -> list[list[str]]:
    """Names of the boxes by layer, lowest first, as the layering test has them."""
    spec = importlib.util.spec_from_file_location("layering", ROOT / "tests" / "test_layering.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return [sorted(layer - {"__main__", "cli", "completion"}) for layer in module.LAYERS]


def imports() -> dict[str, set[str]]:
    """Box -> boxes that its files import."""
    found: dict[str, set[str]] = defaultdict(set)
    for path in sorted((ROOT / "amltrain").rglob("*.py")):
        parts = path.relative_to(ROOT / "amltrain").with_suffix("").parts
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("amltrain"):
                names = [node.module] if node.module.count(".") else [f"amltrain.{a.name}" for a in node.names]
                found[parts[0]] |= {name.split(".")[1] for name in names}
    return {box: others - {box} for box, others in found.items()}


def files(box: str) -> int:
    """Number of files in a box."""
    folder = ROOT / "amltrain" / box
    return len(list(folder.rglob("*.py"))) if folder.is_dir() else 1


def draw() -> str:
    """The picture as SVG, readable on light and dark pages."""
    rows, uses = [row for row in reversed(layers()) if row], imports()
    place: dict[str, tuple[float, float]] = {}
    level = {box: number for number, row in enumerate(rows) for box in row}
    shapes: list[str] = []
    for number, row in enumerate(rows):
        step = WIDTH / len(row)
        for i, box in enumerate(row):
            place[box] = (step * (i + 0.5), 20 + number * ROW)
    for box, (x, y) in place.items():
        below = {level[other] for other in uses.get(box, ()) if other in level and level[other] > level[box]}
        nearest = min(below, default=None)
        for other in sorted(uses.get(box, ())):
            if other in place and level[other] == nearest:
                to = place[other]
                shapes.append(
                    f'<path d="M{x:.0f} {y + BOX:.0f} L{to[0]:.0f} {to[1]:.0f}" stroke="#8a94a0" stroke-width="1.3" '
                    f'fill="none" marker-end="url(#a)"/>'
                )
    for box, (x, y) in place.items():
        wide = max(92, 9 * len(box) + 20)
        note = f"{files(box)} files" if files(box) > 1 else "1 file"
        shapes.append(
            f'<rect x="{x - wide / 2:.0f}" y="{y:.0f}" width="{wide:.0f}" height="{BOX}" rx="6" fill="#eef3f8" '
            f'stroke="#3b6ea5"/><text x="{x:.0f}" y="{y + 19:.0f}" text-anchor="middle" font-size="15" '
            f'fill="#16202b">{box}</text><text x="{x:.0f}" y="{y + 36:.0f}" text-anchor="middle" font-size="11" '
            f'fill="#51606e">{note}</text>'
        )
    height = 20 + len(rows) * ROW
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" font-family="sans-serif" role="img">'
        f"<title>Layers of amltrain</title>"
        f'<defs><marker id="a" markerWidth="8" markerHeight="8" refX="7" refY="4" orient="auto">'
        f'<path d="M0 0 L8 4 L0 8 z" fill="#8a94a0"/></marker></defs>'
        f'<rect width="{WIDTH}" height="{height}" fill="white"/>'
    )
    return head + "\n" + "\n".join(shapes) + "\n</svg>\n"


if __name__ == "__main__":
    PICTURE.write_text(draw(), encoding="utf-8")
