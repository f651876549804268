"""Train a model: one run."""

import sys
from collections.abc import Sequence

from jsonargparse import ArgumentParser

from amltrain.config.parse import build_run_parser, parse_config
from amltrain.config.schema import RunConfig
from amltrain.data.augment import augmentation_sections
from amltrain.errors import one_line_errors
from amltrain.methods.registry import check_options, method_sections

QUICKSTART = "quickstart"


def build_parser() -> ArgumentParser:
    """The parser, for shell completion."""
    return build_run_parser("amltrain train", {})


def read_run(argv: Sequence[str] | None = None) -> RunConfig:
    """Read a run from a command line, and check all its values. Raises UserError."""
    config = parse_config(argv, methods=method_sections(), augmentations=augmentation_sections())
    for options in (config.method_options, *config.augment_options.values()):
        check_options(options)
    return config


def main(argv: Sequence[str] | None = None) -> None:
    """Run with these arguments (default: the command line's); without a --config they change the quickstart."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not any(argument.split("=")[0] == "--config" for argument in arguments):
        arguments = ["--config", QUICKSTART, *arguments]
    with one_line_errors():
        config = read_run(arguments)
        from amltrain.training.trainer import train  # once the arguments are known to be good: torch takes a while

        train(config)
