"""Two hosts with addresses of their own, in network namespaces, train one run; then the cable between them is cut."""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY
from tests.training import runs

ADDRESS = "10.77.0.{}"
STEPS = 8
SPREAD = ("--train.micro_batch_size", "2", "--train.max_steps", str(STEPS), "--evaluation.every_steps", str(STEPS))


def ip(*words: str) -> bool:
    return subprocess.run(["ip", *words], capture_output=True, check=False).returncode == 0


@pytest.fixture
def hosts() -> Iterator[list[str]]:
    """Names of two network namespaces with a cable between them; its ends are called `cable`."""
    names = [f"amltrain-{os.getpid()}-{number}" for number in (1, 2)]
    try:
        if shutil.which("ip") is None or not all(ip("netns", "add", name) for name in names):
            pytest.skip("needs iproute2 and the right to make network namespaces")
        first, second = names
        laid = ip("-n", first, "link", "add", "cable", "type", "veth", "peer", "name", "cable", "netns", second)
        for number, name in enumerate(names, 1):
            laid &= ip("-n", name, "address", "add", ADDRESS.format(number) + "/24", "dev", "cable")
            laid &= ip("-n", name, "link", "set", "lo", "up") and ip("-n", name, "link", "set", "cable", "up")
        if not laid:
            pytest.skip("needs the right to make virtual Ethernet devices")
        yield names
    finally:
        for name in names:
            ip("netns", "delete", name)


def start(host: str, number: int, prepared: Path, output: Path, *extra: str) -> subprocess.Popen:
    """`torchrun` with a process on host 1 or 2, as documented for several machines, gloo in NCCL's place."""
    launcher = [
        *("--nnodes", "2", "--nproc_per_node", "1", "--rdzv_backend", "c10d", "--rdzv_id", output.name),
        *("--rdzv_endpoint", ADDRESS.format(1) + ":29500", "--local_addr", ADDRESS.format(number)),
        *("--rdzv_conf", f"is_host={number == 1}", "--max_restarts", "0"),
    ]
    command = [sys.executable, "-m", "torch.distributed.run", *launcher, "launch/train.py"]
    environment = {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "cable"}
    with output.with_name(f"{output.name}.log.{number}").open("w") as log:
        return subprocess.Popen(
            ["ip", "netns", "exec", host, *command, *runs.arguments(prepared, output, *SPREAD, *extra)],
            cwd=REPOSITORY,
            env={**os.environ, **environment},
            stdout=log,
            stderr=log,
        )


def said(output: Path) -> str:
    return "\n".join(output.with_name(f"{output.name}.log.{number}").read_text() for number in (1, 2))


def test_two_hosts_and_a_cut_cable(hosts: list[str], shapes: Path, tmp_path: Path) -> None:
    alone, output = tmp_path / "alone", tmp_path / "hosts"
    runs.run(shapes, alone, *SPREAD)
    waiting = "another process of this run is gone, or did not answer for 0.1 minutes"
    started = [start(h, n, shapes, output, "--train.collective_timeout", "0.1") for n, h in enumerate(hosts, 1)]
    deadline = time.monotonic() + 120
    try:
        while len(runs.log(output)) < 3:
            assert time.monotonic() < deadline and all(p.poll() is None for p in started), said(output)
            time.sleep(0.02)
        assert ip("-n", hosts[1], "link", "set", "cable", "down")
        assert started[0].wait(timeout=120) == 1, said(output)  # the other's launcher waits on for the first's store
        while said(output).count(waiting) < 2:
            assert time.monotonic() < deadline, said(output)
            time.sleep(0.1)
    finally:
        for process in started:
            process.terminate()  # its worker lives in a session of its own, and goes with it only if it is asked
        for process in started:
            try:
                process.wait(timeout=20)
            except subprocess.TimeoutExpired:
                process.kill()
    assert len(runs.log(output)) < STEPS
    runs.finished(shapes, output, *SPREAD)
    ours, theirs = runs.losses(output), runs.losses(alone)
    assert len(ours) == STEPS
    assert max(abs(a - b) for a, b in zip(ours, theirs, strict=True)) < 5e-5
