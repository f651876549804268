"""Models as files that run without amltrain: torch.export programs and ONNX."""

from pathlib import Path

FORMATS = ("torch", "onnx")


def run_onnx_path() -> Path:
    """The script that goes into every exported folder."""
    return Path(__file__).with_name("run_onnx.py")
