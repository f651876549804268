"""List the registered models by paper, or describe some: parameters, licence, input, what AML scores.

amltrain models               # every model, by paper
amltrain models caris         # those whose name contains this, with their parameters
amltrain models --markdown    # all of it as a Markdown table
"""

import argparse
import inspect
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import asdict

from amltrain.config.schema import Preprocess, Protocol
from amltrain.errors import one_line_errors, unknown_name

WIDTH = 110
INDENT = " " * 4


def build_parser() -> argparse.ArgumentParser:
    """Build the command line's parser."""
    parser = argparse.ArgumentParser(
        prog="amltrain models", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", nargs="?", default="", help="describe the models whose name contains this")
    parser.add_argument("--markdown", action="store_true", help="print a Markdown table instead")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the list, the descriptions or the table."""
    args = build_parser().parse_args(arguments)
    from amltrain.models import list_models  # imports torch

    with one_line_errors():
        names = [name for name in list_models() if args.name in name]
        if not names:
            raise unknown_name("model", args.name, list_models())
    lines = table(names) if args.markdown else description_lines(names) if args.name else list_lines(names)
    for line in lines:
        print(line, flush=True)


def list_lines(names: Sequence[str]) -> Iterator[str]:
    """Yield papers, each with the names of its models."""
    from amltrain.models import model_info

    by_paper: dict[str, list[str]] = {}
    for name in names:
        by_paper.setdefault(model_info(name).paper, []).append(name)
    for paper, models in by_paper.items():
        yield from _wrapped(paper)
        yield from _wrapped("  ".join(models), INDENT)
    yield "\nTrain one: amltrain train --model.name NAME. More about it: amltrain models NAME"


def description_lines(names: Sequence[str]) -> Iterator[str]:
    """Yield what is known of every model; counting the parameters of a large one takes a moment."""
    from amltrain.models import model_info
    from amltrain.models.registry import model_builder

    for name in names:
        info = model_info(name)
        arguments = inspect.signature(model_builder(name)).parameters.values()
        yield f"{name}: {_size(name)} parameters"
        facts = {
            "paper": info.paper,
            "official code": info.official_code,
            "licence": info.licence,
            "AML scores": info.aml_scores,
            "preprocess": _set(info.preprocess),
            "protocol": _set(info.protocol),
            "model.kwargs": "  ".join(f"{argument.name}={argument.default!r}" for argument in arguments),
        }
        for fact, text in facts.items():
            yield from _wrapped(f"{fact}: {text}", INDENT)
        yield ""


def table(names: Sequence[str]) -> Iterator[str]:
    """Yield the rows of a Markdown table, with a header; counting the parameters of a large model takes a moment."""
    from amltrain.models import model_info

    yield "| Model | Parameters (trained) | Paper | Licence of the official code | AML scores |"
    yield "| --- | ---: | --- | --- | --- |"
    for name in names:
        info = model_info(name)
        yield f"| {name} | {_size(name)} | {info.paper} | {info.licence} | {info.aml_scores} |"


def _set(values: Preprocess | Protocol) -> str:
    return "  ".join(f"{name}={value!r}" for name, value in asdict(values).items())


def _size(name: str) -> str:
    """Millions of parameters, and of trained ones where some are frozen."""
    import torch

    from amltrain.models import create_model

    with torch.device("meta"):
        model = create_model(name)
    total = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return f"{total / 1e6:.1f} M" + (f" ({trained / 1e6:.1f} M)" if trained != total else "")


def _wrapped(text: str, indent: str = "") -> list[str]:
    return textwrap.wrap(
        text, WIDTH, initial_indent=indent, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )
