"""Run the commands of tables, and write the tables: what `amltrain paper reproduce` does."""

import argparse
import importlib
import importlib.util
import multiprocessing
import os
import shlex
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from typing import Any

from amltrain.errors import REQUEUE_EXIT_CODE, UserError, one_line_errors
from amltrain.paper.files import STATUS, write_table
from amltrain.paper.plan import TINY_STEPS, Command, Settings, Table, check_data, plan
from amltrain.run_folder import LAST

MODULES = {
    "train": "amltrain.commands.train",
    "evaluate": "amltrain.commands.evaluate",
    "analyse": "amltrain.paper.analyse",
    "benchmark": "benchmarks.command",
}


PRELOADED = [
    *MODULES.values(),
    *("amltrain.training.trainer", "amltrain.commands.evaluate", "amltrain.paper.analyse_models"),
    "torch._dynamo",
]


FORWARDED = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGUSR1") if hasattr(signal, name))


def reproduce(tables: Sequence[Table], args: argparse.Namespace) -> None:
    """Make every table; one that fails does not stop the others.

    Raises UserError if only one table was asked for and its data are missing, SystemExit(1) if any table failed.
    """
    settings = Settings(
        scale=args.scale,
        root=args.output,
        steps=args.steps or TINY_STEPS,
        seeds=tuple(args.seeds),
        prepared=args.prepared,
        flags=tuple(args.flags),
    )
    if args.dry_run:
        print("\n".join(str(c) for c in dict.fromkeys(c for t in tables for c in plan(t, settings) if not c.done)))
        return
    failed: list[str] = []
    seen: set[tuple[str, tuple[str, ...]]] = set()
    for table in tables:
        try:
            if not args.fill_only:
                check_data(table, settings)
                for command in plan(table, settings):
                    if command[:2] not in seen:  # tables share runs
                        run_command(command)
                        seen.add(command[:2])
        except UserError as error:
            if len(tables) == 1:
                raise
            print(f"error: {error}", file=sys.stderr)
            failed.append(table.name)
        print(write_table(table, settings, own_command(table, args)))
    print(f"tables -> {settings.folder / 'tables'}; status -> {settings.root / STATUS}")
    if failed:
        print(f"error: {', '.join(failed)}: not finished, see above", file=sys.stderr)
        raise SystemExit(1)


def own_command(table: Table, args: argparse.Namespace) -> str:
    """The command that makes this table alone."""
    words = ["amltrain", "paper", "reproduce", table.name, "--scale", args.scale]
    words += ["--steps", str(args.steps)] if args.steps else []
    words += ["--seeds", *map(str, args.seeds)] if args.seeds != [0] else []
    words += ["--prepared", args.prepared] if args.prepared != "prepared" else []
    return shlex.join([*words, "--flags", *args.flags] if args.flags else words)


def run_command(command: Command) -> None:
    """Run a command that is not done in a process of its own, and wait. Raises UserError where it fails.

    A process leaves no state of Accelerate and no GPU memory behind. A fork server has imported the libraries, so each
    costs a fork. Requests to stop go on to the process; SystemExit(75) follows when it has saved.
    """
    if command.done and command.name != "train":
        return
    if importlib.util.find_spec(MODULES[command.name].partition(".")[0]) is None:
        raise UserError(
            f"`{command}` needs the folder benchmarks/, which the repository has and the wheel does not; run "
            f"it in a checkout"
        )
    target = _check if command.done else _call
    print("" if command.done else f"\n$ {command}", flush=True)
    started = time.monotonic()
    process = _server().Process(target=target, args=(MODULES[command.name], command.arguments))
    process.start()
    with _forwarding(process):
        process.join()
    if process.exitcode == REQUEUE_EXIT_CODE:
        raise SystemExit(REQUEUE_EXIT_CODE)
    if process.exitcode:
        raise UserError(f"`{command}` ended with code {process.exitcode}; its own message is above")
    if not command.done:
        print(f"# {time.monotonic() - started:.0f} s", flush=True)


def _server() -> Any:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


def _call(module: str, arguments: Sequence[str]) -> None:
    sys.argv = ["amltrain", *arguments]
    importlib.import_module(module).main(list(arguments))


def _check(module: str, arguments: Sequence[str]) -> None:
    """End with an error where a finished run was not trained as these arguments of `amltrain train` ask for."""
    from amltrain.checkpoints.resume import check_recipe
    from amltrain.commands.train import read_run

    def reject(text: str) -> None:
        raise UserError(text.replace("WARNING: ", "").replace("the run continues with the new value", "move it away"))

    with one_line_errors():
        config = read_run(without_launcher(arguments))
        check_recipe((config.folder / LAST).resolve(), config, reject)


def without_launcher(arguments: Sequence[str]) -> list[str]:
    """The arguments of a run, without `--processes N` and `--accelerate FILE`."""
    from amltrain.training.launcher import take_launch_options

    return take_launch_options(arguments)[0]


@contextmanager
def _forwarding(process: BaseProcess) -> Iterator[None]:
    """Hand signals that ask to stop to the process while the block runs."""

    def forward(number: int, _: Any) -> None:
        if process.pid is not None and process.is_alive():
            os.kill(process.pid, number)

    before = {number: signal.signal(number, forward) for number in FORWARDED}
    try:
        yield
    except KeyboardInterrupt:
        process.join()
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
