"""Every launch script starts as a user starts it, and its --help teaches."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = sorted((Path(__file__).parents[2] / "launch").glob("[a-z]*.py"))


@pytest.mark.e2e
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda s: s.stem)
def test_help(script: Path, tmp_path: Path):
    command, environment = [sys.executable, script, "--help"], os.environ | {"PYTHONPATH": str(script.parents[1])}
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    assert "usage: " in run.stdout
    assert len(run.stdout.split()) > 60


@pytest.mark.e2e
def test_no_script_hides_the_evaluate_library():
    """launch/ is first on the path of its scripts, and one of them is called evaluate.py."""
    code = f"import sys; sys.path[0] = {str(SCRIPTS[0].parent)!r}; import evaluate; print(evaluate.Metric.__name__)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert run.stdout == "Metric\n", run.stderr
