"""Train a model: one run."""

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

QUICKSTART = "quickstart"
PRINT = "--print_config"
ESTIMATE = "--estimate"


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
    `accelerate launch`.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
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
    """The arguments, behind the quickstart's config where they name none."""
    named = any(argument.split("=")[0] == "--config" for argument in arguments)
    return arguments if named else ["--config", QUICKSTART, *arguments]


def print_estimate(arguments: list[str]) -> None:
    """Print what the run would cost; nothing is downloaded, prepared or trained."""
    from amltrain.training.launcher import take_launch_options

    with one_line_errors():
        rest, processes, _ = take_launch_options(arguments)
        config = read_run(with_config(rest))
        with no_garbage_collection():
            from amltrain.training.estimate import describe, estimate

        print(describe(config, estimate(config, processes or 1)))


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
