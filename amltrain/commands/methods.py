"""List the training methods, or show the options of one.

amltrain methods
amltrain methods aml         # its options: meaning, default, and the value in each preset
"""

import argparse
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import MISSING, Field, fields
from typing import Any

from amltrain.config.fields import help_texts
from amltrain.errors import one_line_errors
from amltrain.methods.registry import list_methods, method_info


def build_parser() -> argparse.ArgumentParser:
    """Build the command line's parser."""
    parser = argparse.ArgumentParser(
        prog="amltrain methods", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", nargs="?", help="show the options of this method (default: list all methods)")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the list, or one method's options."""
    args = build_parser().parse_args(arguments)
    with one_line_errors():
        lines = list_lines() if args.name is None else option_lines(args.name)
        print("\n".join(lines))


def list_lines() -> Iterator[str]:
    """Yield the name, summary and paper of every method."""
    for name in list_methods():
        info = method_info(name)
        yield f"{name:14} {info.summary}"
        if info.paper:
            yield f"{'':14} {info.paper}"
    yield "\nTrain with one: amltrain train --method NAME. Its options: amltrain methods NAME"


def option_lines(name: str) -> Iterator[str]:
    """Yield a method's summary, paper and options. Raises UserError for an unknown name."""
    info = method_info(name)
    yield f"{name}: {info.summary}"
    if info.paper:
        yield info.paper
    texts = help_texts(info.options)
    presets = info.options.presets() if hasattr(info.options, "presets") else {}
    if not fields(info.options):
        yield "\nThis method has no options."
    for option in fields(info.options):
        values = [f"{preset} {_shown(getattr(values, option.name))}" for preset, values in presets.items()]
        default = f"default by preset: {', '.join(values)}" if values else f"default {_shown(_default(option))}"
        yield f"\n--{name}.{option.name}, {default}"
        yield textwrap.fill(texts.get(option.name, ""), 110, initial_indent="    ", subsequent_indent="    ")


def _default(option: Field[Any]) -> Any:
    return option.default if option.default_factory is MISSING else option.default_factory()


def _shown(value: Any) -> str:
    """A value as YAML writes it."""
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)
