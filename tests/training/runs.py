"""Small runs that the trainer's tests share, in this process or in processes of their own.

A fork server imports everything once, so that a process costs a fork instead of the seconds that torch takes to import.
"""

import json
import multiprocessing
import os
import socket
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from amltrain.cli import QUIET
from amltrain.commands.train import read_run
from amltrain.config.schema import RunConfig
from amltrain.training.tracking import MEASURED
from amltrain.training.trainer import train

SHORT_RUN = Path(__file__).with_name("short_run.yaml")
os.environ.setdefault(*QUIET)  # as a command does, before the server imports torch
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["amltrain.training.trainer", "amltrain.commands.train", "torch._dynamo", "deepspeed"])


def arguments(prepared: Path, output: Path, *extra: str) -> list[str]:
    """A short run with these flags on top."""
    return ["--config", str(SHORT_RUN), "--output", str(output), "--data.prepared", str(prepared), *extra]


def run(prepared: Path, output: Path, *extra: str) -> RunConfig:
    """Train in this process, as a fresh one would."""
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
    config = read_run(arguments(prepared, output, *extra))
    train(config)
    return config


class Launched:
    """A run in processes of its own; what rank r says is in OUTPUT.log.r, errors included."""

    def __init__(self, output: Path, processes: list[BaseProcess]) -> None:
        self.output, self.processes = output, processes

    def wait_until(self, happened: Callable[[], Any], seconds: float = 300) -> None:
        """Until it happened, or the run ended."""
        deadline = time.monotonic() + seconds
        while self.processes[0].is_alive() and not happened():
            assert time.monotonic() < deadline, self.said()
            time.sleep(0.002)

    def send(self, number: int) -> None:
        """A signal to every process."""
        for process in self.processes:
            if process.pid is not None and process.is_alive():
                os.kill(process.pid, number)

    def finish(self, seconds: float = 300) -> int:
        """The exit code, when all processes have ended with the same one."""
        deadline = time.monotonic() + seconds
        for process in self.processes:
            process.join(max(0.0, deadline - time.monotonic()))
            if process.exitcode is None:
                process.kill()
        codes = {process.exitcode for process in self.processes}
        assert len(codes) == 1, f"exit codes {codes}\n{self.said()}"
        (code,) = codes
        return code if code is not None else -1

    def said(self) -> str:
        return "\n".join(
            _log_file(self.output, rank).read_text(errors="replace")[-4000:] for rank in range(len(self.processes))
        )


def launch(
    prepared: Path,
    output: Path,
    *extra: str,
    processes: int = 1,
    before: Callable[[], None] | None = None,
    environment: Mapping[str, str] | None = None,
) -> Launched:
    """Start `amltrain train` on so many processes, with the environment that torchrun gives them.

    before: called in each of them first; environment: on top.
    """
    port, started = free_port(), []
    for rank in range(processes):
        given = dict(environment or {})
        if processes > 1:
            ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
            given |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port} | {k: str(v) for k, v in ranks.items()}
        argv = arguments(prepared, output, *extra)
        started.append(FORKS.Process(target=_main, args=(argv, _log_file(output, rank), given, before)))
        started[-1].start()
    return Launched(output, started)


def launch_nodes(
    prepared: Path, output: Path, *extra: str, nodes: int, before: Callable[[], None] | None = None
) -> Launched:
    """`torchrun --nnodes NODES --rdzv_backend c10d` on every node, all nodes being this machine, with a worker each."""
    endpoint, argv = f"127.0.0.1:{free_port()}", arguments(prepared, output, *extra)
    started = []
    for _ in range(nodes):
        started.append(
            FORKS.Process(target=_node, args=(nodes, endpoint, argv, _log_file(output, len(started)), before))
        )
        started[-1].start()
    return Launched(output, started)


def _node(nodes: int, endpoint: str, argv: Sequence[str], log: Path, before: Callable[[], None] | None) -> None:
    settings = LaunchConfig(
        min_nodes=nodes,
        max_nodes=nodes,
        nproc_per_node=1,
        run_id=endpoint,
        max_restarts=0,
        rdzv_backend="c10d",
        rdzv_endpoint=endpoint,
        local_addr="127.0.0.1",
        start_method="fork",
        monitor_interval=0.1,
    )
    with log.open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    elastic_launch(settings, _main)(argv, log, {}, before)


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def finished(*arguments: Any, expected: int = 0, **keywords: Any) -> str:
    """`launch`, waited for; what it said."""
    launched = launch(*arguments, **keywords)
    code = launched.finish()
    assert code == expected, f"exit code {code}\n{launched.said()}"
    return launched.said()


def _log_file(output: Path, rank: int) -> Path:
    return output.with_name(f"{output.name}.log.{rank}")


def _main(argv: Sequence[str], log: Path, environment: dict[str, str], before: Callable[[], None] | None) -> None:
    os.environ.update(environment)
    with log.open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    torch.set_num_threads(1)
    multiprocessing.set_start_method("fork", force=True)  # what loaders find in a process that no server forked
    from amltrain.commands.train import main

    if before is not None:
        before()
    main(argv)


def losses(output: Path) -> list[float]:
    return [entry["loss"] for entry in log(output) if "loss" in entry]


def logged(output: Path) -> list[dict[str, Any]]:
    """Every row of the log, without what is measured and so differs between two runs."""
    return [{key: value for key, value in row.items() if key not in MEASURED} for row in log(output)]


def log(output: Path) -> list[dict[str, Any]]:
    """What the run has logged, without a line that is being written, or that a kill cut off."""
    path = output / "log.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.is_file() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def weights(output: Path, checkpoint: str = "last") -> dict[str, Tensor]:
    return load_file(output / checkpoint / "model" / "model.safetensors")


def same_weights(one: Path, other: Path) -> bool:
    """Bit for bit."""
    a, b = weights(one), weights(other)
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def largest_difference(one: Path, other: Path) -> float:
    a, b = weights(one), weights(other)
    assert a.keys() == b.keys()
    return max(float((a[key].float() - b[key].float()).abs().max()) for key in a if a[key].numel())
