"""List what this version knows: models, methods, augmentations, losses, metrics, data sets, callbacks, configs.

    amltrain list models                     # every model, by paper
    amltrain list models caris               # those whose name contains this, with their parameters
    amltrain list models --markdown          # all of it as a Markdown table
    amltrain list methods aml                # a method's options: meaning, default, and the value in each preset
    amltrain list augmentations
    amltrain list losses                     # also: metrics, datasets, callbacks, optimizers
    amltrain list configs recipes/paper      # the shipped configs whose names start so
    amltrain list configs quickstart         # one file; --path prints only where it is
    amltrain list configs --schema > amltrain.schema.json      # for editors: keys are completed and checked

With --import MODULE_OR_FILE, and for installed plugins, the names of plugins are listed too.
"""

import argparse
import inspect
import json
import textwrap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import MISSING, Field, asdict, fields
from typing import Any

from amltrain.config.fields import help_texts
from amltrain.config.files import find_config, shipped_configs
from amltrain.config.schema import Preprocess, Protocol
from amltrain.errors import UserError, one_line_errors, unknown_name
from amltrain.registry import AUGMENTATIONS, CALLBACKS, DATASETS, LOSSES, METHODS, METRICS, MODELS

WIDTH = 110
INDENT = " " * 4


def build_parser() -> argparse.ArgumentParser:
    """Build the command line's parser."""
    parser = argparse.ArgumentParser(
        prog="amltrain list", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=sorted(KINDS), help="what to list")
    parser.add_argument("name", nargs="?", default="", help="describe this one, or those whose name contains it")
    parser.add_argument("--markdown", action="store_true", help="models: print a Markdown table instead")
    parser.add_argument("--path", action="store_true", help="configs: print only the path of the file")
    parser.add_argument("--schema", action="store_true", help="configs: print the JSON Schema of config files")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the list, the description or the table."""
    args = build_parser().parse_args(arguments)
    with one_line_errors():
        for line in KINDS[args.what](args):
            print(line, flush=True)


def model_lines(args: argparse.Namespace) -> Iterator[str]:
    """Yield all models by paper, the description of some, or the table."""
    names = [name for name in MODELS.names() if args.name in name]
    if not names:
        raise unknown_name("model", args.name, MODELS.names())
    return model_table(names) if args.markdown else description_lines(names) if args.name else paper_lines(names)


def paper_lines(names: Sequence[str]) -> Iterator[str]:
    """Yield papers, each with the names of its models."""
    by_paper: dict[str, list[str]] = {}
    for name in names:
        by_paper.setdefault(MODELS[name].details.paper, []).append(name)
    for paper, models in by_paper.items():
        yield from _wrapped(paper)
        yield from _wrapped("  ".join(models), INDENT)
    yield "\nTrain one: amltrain train --model.name NAME. More about it: amltrain list models NAME"


def description_lines(names: Sequence[str]) -> Iterator[str]:
    """Yield what is known of every model; counting the parameters of a large one takes a moment."""
    for name in names:
        info = MODELS[name].details
        arguments = inspect.signature(MODELS[name].value).parameters.values()
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


def model_table(names: Sequence[str]) -> Iterator[str]:
    """Yield the rows of a Markdown table, with a header; counting the parameters of a large model takes a moment."""
    yield "| Model | Parameters (trained) | Paper | Licence of the official code | AML scores |"
    yield "| --- | ---: | --- | --- | --- |"
    for name in names:
        info = MODELS[name].details
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


def method_lines(args: argparse.Namespace) -> Iterator[str]:
    """Yield the name, summary and paper of every method, or one method's options."""
    if args.name:
        yield from option_lines(args.name)
        return
    for name in METHODS.names():
        info = METHODS[name].details
        yield f"{name:14} {info.summary}"
        if info.paper:
            yield f"{'':14} {info.paper}"
    yield "\nTrain with one: amltrain train --method NAME. Its options: amltrain list methods NAME"


def option_lines(name: str) -> Iterator[str]:
    """Yield a method's summary, paper and options. Raises UserError for an unknown name."""
    info = METHODS[name].details
    yield f"{name}: {info.summary}"
    if info.paper:
        yield info.paper
    options = METHODS.options(name)
    texts = help_texts(options)
    presets = options.presets() if hasattr(options, "presets") else {}
    if not fields(options):
        yield "\nThis method has no options."
    for option in fields(options):
        values = [f"{preset} {_shown(getattr(values, option.name))}" for preset, values in presets.items()]
        default = f"default by preset: {', '.join(values)}" if values else f"default {_shown(_default(option))}"
        yield f"\n--{name}.{option.name}, {default}"
        yield textwrap.fill(texts.get(option.name, ""), 110, initial_indent="    ", subsequent_indent="    ")


def augmentation_lines(args: argparse.Namespace) -> Iterator[str]:
    """Yield every augmentation with its options and their defaults."""
    for name in _chosen(AUGMENTATIONS.names(), args.name, "augmentation"):
        options = AUGMENTATIONS.options(name)
        yield f"{name}: {(options.__doc__ or '').strip().splitlines()[0]}"
        for option in fields(options):
            yield f"  --{name}.{option.name} {_shown(_default(option))}"


def loss_lines(args: argparse.Namespace) -> Iterator[str]:
    """Yield every loss with its arguments."""
    for name in _chosen(LOSSES.names(), args.name, "loss"):
        build = LOSSES[name].value
        arguments = [a for a in inspect.signature(build).parameters.values() if a.kind is not a.VAR_KEYWORD]
        yield f"{name}: {_first_line(build)}"
        yield f"  loss.kwargs: {'  '.join(f'{a.name}={a.default!r}' for a in arguments) or 'none'}"


def metric_lines(args: argparse.Namespace) -> Iterator[str]:
    """Yield every metric, by kind."""
    import amltrain.evaluation.metrics  # noqa: F401 - registers them

    for kind, registry in METRICS.items():
        yield f"{kind}:"
        for name in _chosen([entry.name for entry in registry.registered()], args.name, f"{kind} metric"):
            yield f"  {name:22} {_first_line(registry[name].value)}"


def dataset_lines(args: argparse.Namespace) -> Iterator[str]:
    """Yield every data set of the table: splits, and published counts of expressions."""
    for name in _chosen(DATASETS.names(), args.name, "data set"):
        spec = DATASETS[name].value
        counts = [f"{split} {spec.published[split].expressions:,}" if split in spec.published
                  and spec.published[split].expressions else split for split in spec.splits]  # fmt: skip
        yield f"{name:18} {', '.join(counts)}"


def callback_lines(args: argparse.Namespace) -> Iterator[str]:
    """Yield every callback."""
    for name in _chosen(CALLBACKS.names(), args.name, "callback"):
        yield f"{name:14} {_first_line(CALLBACKS[name].value)}"


def config_lines(args: argparse.Namespace) -> Iterator[str]:
    """Yield the names of shipped configs with their first lines, one file, its path, or the JSON Schema."""
    shipped = shipped_configs()
    if args.schema:
        from amltrain.config.parse import config_schema

        yield json.dumps(config_schema(), indent=2)
        return
    if args.path and not args.name:
        raise UserError("--path needs the name of a config; `amltrain list configs` lists them")
    listed = {name: path for name, path in shipped.items() if name.startswith(args.name)}
    if args.path or args.name in shipped or not listed:
        path = find_config(args.name, "amltrain list configs").path
        yield str(path) if args.path else path.read_text(encoding="utf-8").strip()
        return
    for name, found in listed.items():
        yield f"{name:48} {found.title}"


def optimizer_lines(args: argparse.Namespace) -> Iterator[str]:
    """Yield the values of optim.optimizer: torch's two, and timm's with its own description."""
    from timm.optim import get_optimizer_info, list_optimizers

    from amltrain.training.optim import ADAM, OPTIMIZERS

    here = {*ADAM, *OPTIMIZERS} & {*ADAM, *list_optimizers()}
    for name in _chosen(sorted(here), args.name, "optimizer"):
        yield f"{name:14} {'torch' if name in ADAM else 'timm'}: {get_optimizer_info(name).description}"


KINDS: dict[str, Callable[[argparse.Namespace], Iterator[str]]] = {
    "models": model_lines,
    "methods": method_lines,
    "augmentations": augmentation_lines,
    "losses": loss_lines,
    "metrics": metric_lines,
    "datasets": dataset_lines,
    "callbacks": callback_lines,
    "optimizers": optimizer_lines,
    "configs": config_lines,
}


def _chosen(names: Sequence[str], part: str, kind: str) -> list[str]:
    chosen = [name for name in names if part in name]
    if not chosen and part:
        raise unknown_name(kind, part, names)
    return chosen


def _first_line(documented: Any) -> str:
    return (documented.__doc__ or "").strip().partition("\n")[0]


def _default(option: Field[Any]) -> Any:
    return option.default if option.default_factory is MISSING else option.default_factory()


def _shown(value: Any) -> str:
    """A value as YAML writes it."""
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _wrapped(text: str, indent: str = "") -> list[str]:
    return textwrap.wrap(
        text, WIDTH, initial_indent=indent, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )
