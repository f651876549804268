"""The git commit of this code, for records of results."""

import os
import subprocess
from functools import cache
from pathlib import Path


@cache
def code_commit() -> str | None:
    """Git commit of this package's checkout, with "-dirty" after it if files differ from it.

    Without a checkout, as in the docker image, use AMLTRAIN_COMMIT; None if it is not set.
    """
    root = Path(__file__).resolve().parents[1]
    if not (root / ".git").exists():
        return os.environ.get("AMLTRAIN_COMMIT") or None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude", "*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
