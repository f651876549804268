"""Every launch script starts as a user starts it, from any folder, and its --help teaches.

None of them lets launch/evaluate.py hide the library `evaluate`, which they all import in the end.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = sorted((Path(__file__).parents[2] / "launch").glob("[a-z]*.py"))


@pytest.mark.e2e
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda s: s.stem)
def test_help(script: Path, tmp_path: Path):
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, script, "--help"]
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    assert "usage: " in run.stdout
    assert len(run.stdout.split()) > 60
