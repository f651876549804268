"""The picture of the architecture shows today's imports."""

import importlib.util
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_the_picture_is_drawn_from_the_imports() -> None:
    spec = importlib.util.spec_from_file_location("draw", ROOT / "docs" / "draw_architecture.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    drawn = module.draw()
    assert module.PICTURE.read_text(encoding="utf-8") == drawn, "run: python docs/draw_architecture.py"
    assert ">training<" in drawn and drawn.count("<path d=") > 20
