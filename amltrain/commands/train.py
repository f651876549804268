"""Train a model: one run."""

import argparse
import gc
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

from jsonargparse import ArgumentParser

from amltrain.config.parse import as_yaml, build_run_parser, checked
from amltrain.config.schema import RunConfig
from amltrain.errors import exit_on_signals, one_line_errors, same_on_every_process
from amltrain.registry import import_flags
from amltrain.run_folder import is_repository

QUICKSTART = "quickstart"
PRINT = "--print_config"
ESTIMATE = "--estimate"
JOB = "--job"


def build_parser() -> ArgumentParser:
    """The parser, for shell completion."""
    return build_run_parser("amltrain train", {})


def read_run(argv: Sequence[str] | None = None) -> RunConfig:
    """Read a run from a command line, and check all its values. Raises UserError.

    `--print_config` prints the run with its method's preset filled in, and exits; `--estimate` is for `main`.
    """
    given = list(sys.argv[1:] if argv is None else argv)
    arguments = [argument for argument in given if argument not in (PRINT, ESTIMATE)]
    config = checked(arguments)
    if PRINT in given:
        options = config.method_options
        complete = options.complete() if options is not None and hasattr(options, "complete") else options
        print(as_yaml(replace(config, method_options=complete)), end="")
        sys.exit(0)
    return config


def main(argv: Sequence[str] | None = None) -> None:
    """Run with these arguments (default: the command line's); without a --config they change the quickstart.

    `--processes N` starts N processes, `--accelerate FILE` uses a file of `accelerate config`; neither is for use under
    `accelerate launch`. `--job FLAVOR` starts the run on Hugging Face Jobs instead.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if any(argument.split("=")[0] == JOB for argument in arguments):
        print_job(arguments)
        return
    if ESTIMATE in arguments:
        print_estimate(arguments)
        return
    if any(argument.split("=")[0] in ("--processes", "--accelerate") for argument in arguments):
        from amltrain.training.launcher import launch_processes, take_launch_options

        rest, processes, file = take_launch_options(arguments)
        launch_processes([*import_flags(), *rest], processes, file)
        return
    arguments = with_config(arguments)
    with one_line_errors():
        with exit_on_signals():
            with same_on_every_process():
                config = read_run(arguments)
            with no_garbage_collection():
                from amltrain.training.trainer import train  # once the arguments are known to be good: torch takes time

        train(config)


def with_config(arguments: list[str]) -> list[str]:
    """The arguments behind a config, if they name none: of the run on the Hub that they resume, or the quickstart's."""
    if any(argument.split("=")[0] == "--config" for argument in arguments):
        return arguments
    named = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    named.add_argument("--resume", default="auto")
    resume = named.parse_known_args(arguments)[0].resume
    if is_repository(resume):
        from amltrain.hub.run_state import fetch_config  # takes a while to import

        return ["--config", str(fetch_config(resume)), *arguments]
    return ["--config", QUICKSTART, *arguments]


def print_estimate(arguments: list[str]) -> None:
    """Print what the run would cost; nothing is downloaded, prepared or trained."""
    from amltrain.training.launcher import take_launch_options

    with one_line_errors():
        rest, processes, _ = take_launch_options(arguments)
        config = read_run(with_config(rest))
        with no_garbage_collection():
            from amltrain.training.estimate import describe, estimate

        print(describe(config, estimate(config, processes or 1)))


def take_job_options(arguments: Sequence[str]) -> tuple[list[str], argparse.Namespace]:
    """Split off what describes a job; returns the other arguments, and `job`, `job_timeout` and `job_image`."""
    parser = argparse.ArgumentParser(prog="amltrain train", add_help=False, allow_abbrev=False)
    for name in (JOB, "--job_timeout", "--job_image"):
        parser.add_argument(name)
    known, rest = parser.parse_known_args(arguments)
    return rest, known


def print_job(arguments: list[str]) -> None:
    """Start the run on Hugging Face Jobs, and print where; nothing is trained here."""
    rest, known = take_job_options(arguments)
    with one_line_errors():
        config = read_run(with_config(rest))
        with no_garbage_collection():
            from amltrain.hub.jobs import IMAGE, TIMEOUT, start_job

        number, address = start_job(
            config, known.job, timeout=known.job_timeout or TIMEOUT, image=known.job_image or IMAGE
        )
        print(f"started: {address}\nlog:     hf jobs logs {number}\nend it:  hf jobs cancel {number}")


@contextmanager
def no_garbage_collection() -> Iterator[None]:
    """Import without looking for garbage: libraries make a million objects that stay, a sixth of the time."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


if __name__ == "__main__":
    main()
