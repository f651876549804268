"""A command that is asked to stop ends in one line, with its loader processes; no signal is lost in a fork."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.commands.failing_writes import _model

DATA = ("--splits", "val", "--data.datasets", "[refshapes]", "--data.workers", "1", "--pictures", "0")


def start(model: Path, prepared: Path, output: Path, processes: int) -> subprocess.Popen[str]:
    """Evaluate again and again, so that it cannot end before the signal; in a process group of its own."""
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", str(processes)] if processes > 1 else []
    harder = ["--perturbations", "all", "--severity", *(str(n / 10) for n in range(1, 10)), "--batch_size", "1"]
    command = [sys.executable, *launcher, "-m", "amltrain", "evaluate", "--checkpoint", str(model)]
    command += [*DATA, "--data.prepared", str(prepared), "--output", str(output), *harder]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


def of_group(name: str) -> list[str]:
    """Processes whose command line has a name in it."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            gone = "\nState:\tZ" in (entry / "status").read_text()
        except OSError:
            continue
        if name in line and not gone:
            found.append(line)
    return found


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks into /proc")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("processes", [1, 2])
def test_an_evaluation_ends_in_one_line(shapes: Path, tmp_path: Path, number: signal.Signals, processes: int) -> None:
    output = tmp_path / "out"
    process = start(_model(tmp_path / "model"), shapes, output, processes)
    try:
        deadline = time.monotonic() + 240
        while not (output / "results.json").exists():
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.1)
        os.killpg(process.pid, number)
        said, _ = process.communicate(timeout=60)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    own = "interrupted" if number == signal.SIGINT else "ended by SIGTERM; run again"
    assert said.count(own) == 1
    if processes == 1:  # torchrun adds a trace of its own
        assert "Traceback" not in said
        assert process.returncode == (130 if number == signal.SIGINT else 143)
    assert "amltrain/" not in said.replace(str(tmp_path), ""), said  # no trace through our files
    deadline = time.monotonic() + 15
    while of_group(str(tmp_path)) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert of_group(str(tmp_path)) == []
    from amltrain.evaluation.results import read_results

    assert read_results(output / "results.json")


FORKING = """
import os, signal, sys, time
import torch
from torch.utils.data import Dataset
from amltrain.data import loaders
from amltrain.errors import one_line_errors

class Numbers(Dataset):
    talk = None
    def __len__(self): return 4
    def __getitem__(self, i): return torch.tensor(i)

def strike():
    os.kill(os.getpid(), signal.SIGTERM)

os.register_at_fork(**{sys.argv[1]: strike})
loaders.collate = lambda samples, talk=None: torch.stack(samples)
loader = loaders._loader(Numbers(), 1, batch_size=2)
with one_line_errors():
    print(sum(int(batch.sum()) for batch in loader), flush=True)
"""


@pytest.mark.skipif(not hasattr(os, "register_at_fork"), reason="this system has no fork")
@pytest.mark.parametrize(
    ("hook", "code", "said"),
    [
        ("after_in_parent", 143, "ended by SIGTERM; run again\n"),
        ("before", 143, "ended by SIGTERM; run again\n"),
        ("after_in_child", 0, "6\n"),
    ],
)
def test_a_signal_in_a_fork_of_a_loader_is_neither_lost_nor_taken_by_it(hook: str, code: int, said: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", FORKING, hook], capture_output=True, text=True, check=False, timeout=120
    )
    assert (done.returncode, done.stdout + done.stderr) == (code, said)


def test_a_picture_too_small_for_a_model_is_a_sentence(shapes: Path, tmp_path: Path) -> None:
    import torch

    from amltrain.commands.train import read_run
    from amltrain.errors import UserError
    from amltrain.training.stopping import explained
    from tests.training.runs import arguments

    config = read_run(arguments(shapes, tmp_path, "--preprocess.size", "8", "--model.name", "lavt_tiny"))
    with pytest.raises(UserError, match=r"preprocess\.size 8 is too small for lavt_tiny"), explained(config):
        torch.nn.InstanceNorm1d(4)(torch.zeros(2, 4, 1))
    with pytest.raises(ValueError, match="another"), explained(config):
        raise ValueError("another")
