"""A process that measures one case after another; the parent ends it when a case fails or takes too long."""

import gc
import importlib
import os
import signal
import socket
import sys
import threading
import traceback
from contextlib import suppress
from multiprocessing import get_context, parent_process
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from amltrain.errors import UserError, first_line
from benchmarks.suite.plan import Case

SPAWN = get_context("spawn")
FSDP2 = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_AUTO_WRAP_POLICY": "NO_WRAP",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
    "FSDP_OFFLOAD_PARAMS": "false",
    "FSDP_ACTIVATION_CHECKPOINTING": "false",
}
"""What `accelerate launch` sets for configs/accelerate/fsdp2.yaml."""


def environment(engine: str, device: str) -> dict[str, str]:
    """Environment variables of a process of `accelerate launch` that is alone."""
    given = {"ACCELERATE_USE_CPU": "true"} if device == "cpu" else {}
    if engine == "single":
        return given
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return {**given, **alone, **address, **(FSDP2 if engine == "fsdp2" else {})}


class Worker:
    """The parent's end of a measuring process."""

    def __init__(self, engine: str, device: str, log: Path) -> None:
        """log: file that gets everything the process prints."""
        self.engine = engine
        self._connection, theirs = SPAWN.Pipe()
        self._process = SPAWN.Process(target=_serve, args=(theirs, environment(engine, device), log))
        self._process.start()
        theirs.close()

    def measure(self, case: Case, seconds: float) -> dict[str, Any]:
        """Return {"values": ...} or {"error": one line}. Ends the process after an error or too much time."""
        try:
            self._connection.send((case.function, case.options))
            if not self._connection.poll(max(0.0, seconds)):
                self.end()
                return {"error": f"stopped after {seconds:.0f} s"}
            answer = self._connection.recv()
        except (EOFError, OSError):
            self.end()
            return {"error": f"the process ended with code {self._process.exitcode}"}
        if "error" in answer:
            self.end()
        return answer

    @property
    def alive(self) -> bool:
        return self._process.is_alive()

    def end(self) -> None:
        """Kill the process and everything that it started."""
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid or 0, signal.SIGKILL)
        self._process.kill()  # it may not have made its group yet
        self._process.join()


def _end_with_parent() -> None:
    parent = parent_process()
    if parent is not None:
        parent.join()
        os.killpg(0, signal.SIGKILL)


def _free_memory() -> None:
    """Give the next measurement what this one held."""
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def _serve(connection: Connection, variables: dict[str, str], log: Path) -> None:
    os.setsid()  # a group that the parent can kill with its loader processes and compilers
    threading.Thread(target=_end_with_parent, daemon=True).start()
    for name in list(os.environ):
        if name.startswith(("ACCELERATE_", "FSDP_")):
            del os.environ[name]
    os.environ.update(variables)
    with log.open("ab") as file:
        os.dup2(file.fileno(), sys.stdout.fileno())
        os.dup2(file.fileno(), sys.stderr.fileno())
    while True:
        try:
            function, options = connection.recv()
        except EOFError:
            return
        try:
            module, name = function.split(":")  # imports torch, under these variables
            measure = getattr(importlib.import_module(f"benchmarks.suite.{module}"), name)
            connection.send({"values": measure(**options)})
            _free_memory()
        except Exception as error:  # whatever fails must not end the suite
            traceback.print_exc()
            kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
            connection.send({"error": f"{kind}{first_line(error)[:200]}"})
