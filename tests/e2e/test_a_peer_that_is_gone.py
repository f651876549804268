"""A process whose peer never came says so in one line, however it was started."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.e2e
@pytest.mark.parametrize("start", [["-m", "amltrain", "train"], ["launch/train.py"]], ids=["amltrain", "launch"])
def test_one_line_for_a_peer_that_never_came(start: list[str], repository: Path, shapes: Path, tmp_path: Path) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    environment = {
        **os.environ, "RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip
    environment.pop("TORCH_CPP_LOG_LEVEL", None)
    flags = ["--output", str(tmp_path / "run"), "--data.prepared", str(shapes), "--train.collective_timeout", "0.05"]
    command = [sys.executable, *start, *flags]
    done = subprocess.run(command, env=environment, cwd=repository, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    [line] = [line for line in done.stderr.splitlines() if line.strip()]
    assert line.startswith("error: another process of this run is gone, or did not answer for 0.05 minutes")
