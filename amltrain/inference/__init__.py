"""Use a trained model: predictor, evaluation, demo, exported files."""

from collections.abc import Sequence
from importlib.util import find_spec

FORMATS = ("torch", "onnx")
"""Of exported models."""
ONNX_PACKAGES = ("onnx", "onnxruntime", "onnxscript")


def missing_for_onnx(formats: Sequence[str]) -> str:
    """The package that ONNX lacks here, with the line that installs it; empty = nothing, or no ONNX is wanted."""
    lacking = [name for name in ONNX_PACKAGES if find_spec(name) is None] if "onnx" in formats else []
    return f"it needs {' and '.join(lacking)}: pip install {' '.join(ONNX_PACKAGES)}" if lacking else ""
