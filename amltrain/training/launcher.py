"""Starts a run on several processes with torchrun or Accelerate's launcher, and ends with the run's own exit code.

`accelerate launch` ends every failure with a traceback of its own after the run's one-line error. Here the launcher
runs in this process, so its error can be turned into an exit code.
"""

import argparse
import logging
import subprocess
import sys
from collections.abc import Sequence

from accelerate.commands.launch import launch_command, launch_command_parser
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main as torchrun

from amltrain.errors import REQUEUE_EXIT_CODE

TERMINATED = -15
"""How the other processes end when the launcher stops them after the first failure."""


def launch_processes(arguments: Sequence[str], processes: int | None, config_file: str | None) -> None:
    """Run `amltrain train` with these arguments on `processes` processes; returns when all have ended well.

    config_file: of `accelerate config`, e.g. configs/accelerate/zero2.yaml; None = torchrun (DDP). Raises
    SystemExit with the exit code of the process that failed first.
    """
    for name in ("torch.distributed.elastic", "torch.distributed.run"):
        logging.getLogger(name).setLevel(logging.CRITICAL)  # the run has printed its own error
    module = ["-m", "amltrain", "train", *arguments]
    try:
        if config_file is None:
            torchrun(["--standalone", "--nproc_per_node", str(processes or 1), *module])
        else:
            count = [] if processes is None else ["--num_processes", str(processes)]
            launch_command(launch_command_parser().parse_args(["--config_file", config_file, *count, *module]))
    except ChildFailedError as error:
        raise SystemExit(exit_code([failure.exitcode for failure in error.failures.values()])) from None
    except subprocess.CalledProcessError as error:
        raise SystemExit(error.returncode if error.returncode > 0 else 128 - error.returncode) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None


def exit_code(codes: Sequence[int]) -> int:
    """The one exit code of several processes: that of a request to stop, else of the first failure."""
    if REQUEUE_EXIT_CODE in codes:
        return REQUEUE_EXIT_CODE
    own = [code for code in codes if code not in (0, TERMINATED)] or list(codes) or [1]
    return own[0] if own[0] > 0 else 128 - own[0]


def take_launch_options(arguments: Sequence[str]) -> tuple[list[str], int | None, str | None]:
    """Split off `--processes N` and `--accelerate FILE`; returns the other arguments and the two values.

    Exits with a usage message for a number that is none.
    """
    parser = argparse.ArgumentParser(prog="amltrain train", add_help=False, allow_abbrev=False)
    parser.add_argument("--processes", type=int)
    parser.add_argument("--accelerate")
    known, rest = parser.parse_known_args(arguments)
    if known.processes is not None and known.processes < 1:
        print("error: --processes must be at least 1", file=sys.stderr)
        raise SystemExit(2)
    return rest, known.processes, known.accelerate
