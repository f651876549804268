"""Every launch script starts as a user starts it, and its --help teaches."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = sorted((Path(__file__).parents[2] / "launch").glob("[a-z]*.py"))


@pytest.mark.e2e
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda s: s.stem)
def test_help(script: Path, tmp_path: Path):
    # from another folder: neither the working directory nor launch/ on the path may matter
    run = subprocess.run([sys.executable, script, "--help"], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    assert "usage: " in run.stdout
    assert len(run.stdout.split()) > 60
