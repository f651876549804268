"""Reads a run from a command line and config files. The only file that knows the config library (jsonargparse)."""

import argparse
import difflib
import json
import numbers
import re
import sys
import tempfile
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import fields
from datetime import date
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentParser, Namespace, set_parsing_settings

from amltrain.config.fields import ANY, POSITIVE, field_types, iter_keys
from amltrain.config.files import BASE, VARIANTS, groups_of, read_config_files, read_flags
from amltrain.config.schema import RunConfig, sectioned
from amltrain.errors import UserError, unknown_name
from amltrain.registry import AUGMENTATIONS, CALLBACKS, METHODS, MODELS, Registry, check_options, imported_plugins

DERIVED = ("method_options", "augment_options", "callback_options")
"""Fields of a run that are read from sections."""
SECTIONED: tuple[Registry[Any], ...] = (METHODS, AUGMENTATIONS, CALLBACKS)
"""Kinds whose options are sections of a run."""
DIALECT = "$schema"
USUAL_NAMES = {
    "batch_size": "did you mean train.global_batch_size?",
    "per_device_train_batch_size": "did you mean train.micro_batch_size?",
    "learning_rate": "did you mean optim.lr?",
    "num_epochs": "did you mean train.epochs?",
    "num_train_epochs": "did you mean train.epochs?",
    "num_workers": "did you mean data.workers?",
    "output_dir": "did you mean output?",
    "fp16": "did you mean train.mixed_precision fp16?",
    "bf16": "did you mean train.mixed_precision bf16?",
    "gradient_accumulation_steps": "set train.micro_batch_size: the rest of train.global_batch_size is accumulated",
    "device": "set CUDA_VISIBLE_DEVICES, or ACCELERATE_USE_CPU=true for the CPU",
    "cpu": "set ACCELERATE_USE_CPU=true",
    "gpus": "did you mean --processes?",
    "num_gpus": "did you mean --processes?",
}
"""What other trainers call a key, and what to write here."""


class NoGroups:
    """Placeholder for a section whose values are not groups."""


def parse_config(argv: Sequence[str] | None = None, *, prog: str = "amltrain train") -> RunConfig:
    """Read a run from a command line: `--config` files and their bases (later ones win), then flags.

    Options of methods and augmentations are sections of their names. Raises UserError for a key or a value that does
    not fit, naming it. `--help` prints and exits.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    check_sections()
    sections = {name: NoGroups for registry in SECTIONED for name in registry.names()}
    layers = read_config_files(argv, {**sections, **groups_of(RunConfig)}, field_types(RunConfig))
    flags, files = read_flags(argv), layers.values
    method = str(flags.get("method") or files.get("method") or RunConfig.method)
    if method not in METHODS:
        raise UserError(f"{layers.place('method')}{unknown_name(METHODS.kind, method, METHODS.names())}")
    mentioned = {method, *files, *(key.split(".")[0] for key in flags)}
    options = {name: kind.options(name) for kind in SECTIONED for name in kind.names() if name in mentioned}
    parser = build_run_parser(prog, options)
    if {"-h", "--help"} & set(argv):
        if "all" in argv:
            layers.arguments.remove("all")
        else:
            _show_basic_keys(parser, {key.split(".")[0] for key in flags} | {flags.get("method", "")})
    try:
        parsed = parser.instantiate(parser.parse_args(layers.arguments))
    except UserError as error:
        raise UserError(f"{layers.place(str(error))}{error}") from error
    except Exception as error:  # jsonargparse raises its own types; all are about the command line
        message = one_line(str(error), parser)
        raise UserError(f"{layers.place(message)}{message}") from error
    values = {f.name: parsed[f.name] for f in fields(RunConfig) if f.name not in DERIVED}
    model = values["model"].name
    if model not in MODELS:
        raise UserError(f"{layers.place('model.name')}{unknown_name(MODELS.kind, model, MODELS.names())} (model.name)")
    values["imports"] = list(dict.fromkeys([*values["imports"], *imported_plugins()]))
    reject_unused(flags, [method], METHODS)
    own = _section(parsed, method, options) if method in options else None
    lists = {"augment_options": (AUGMENTATIONS, "data.augment"), "callback_options": (CALLBACKS, "train.callbacks")}
    for field_name, (registry, key) in lists.items():
        group, _, name_of_key = key.partition(".")
        used = getattr(values[group], name_of_key)
        reject_unused(flags, used, registry)
        for name in used:
            if name not in registry:
                raise unknown_name(f"{registry.kind} ({key})", name, registry.names())
        values[field_name] = {
            name: _section(parsed, name, options) if name in options else registry.options(name)() for name in used
        }
    try:
        return RunConfig(**values, method_options=own)
    except UserError as error:
        raise UserError(f"{layers.place(str(error))}{error}") from error


def check_sections() -> None:
    """Raise UserError for a plugin's name that already stands for another section or key of a run."""
    taken = {own.name: "a key of every run" for own in fields(RunConfig)}
    for registry in SECTIONED:
        for name in registry.names():
            if name in taken:
                raise UserError(f"{registry.kind} {name!r} has the name of {taken[name]}; register it under another")
            taken[name] = f"a registered {registry.kind}"


def config_of(values: Mapping[str, Any] | str | Path, base: str | None) -> RunConfig:
    """Read a run from nested values, or from the path or shipped name of a file, through the same checks.

    base: a shipped config or file below it. Raises UserError.
    """
    layers = [] if base is None else ["--config", str(base)]
    if isinstance(values, (str, Path)):
        return checked([*layers, "--config", str(values)])
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "settings.yaml"
        file.write_text(yaml.safe_dump(_plain(dict(values)), sort_keys=False), encoding="utf-8")
        try:
            return checked([*layers, *(["--config", str(file)] if values else [])])
        except UserError as error:  # the file is ours; its reader has no use for the place
            raise UserError(re.sub(rf"{re.escape(str(file))}, line \d+(, |: )", "", str(error))) from error


def checked(argv: Sequence[str]) -> RunConfig:
    """`parse_config`, and the options of its method, augmentations and callbacks checked. Raises UserError."""
    config = parse_config(argv)
    for options in (config.method_options, *config.augment_options.values(), *config.callback_options.values()):
        check_options(options)
    return config


def _section(parsed: Namespace, name: str, options: dict[str, type]) -> Any:
    """The options of one section; one without any fields has no arguments to read."""
    kind = options[name]
    return parsed[name] if fields(kind) else kind()


def save_config(config: RunConfig, path: Path, comments: Sequence[str] = ()) -> None:
    """Write a run so that `--config PATH` repeats it, under lines of comment."""
    head = "".join(f"# {line}\n" for line in comments)
    path.write_text(head + as_yaml(config), encoding="utf-8")


def as_yaml(config: RunConfig) -> str:
    """A run as a config file."""
    return yaml.safe_dump(_plain(sectioned(config)), sort_keys=False)


def build_run_parser(prog: str, options: dict[str, type]) -> ArgumentParser:
    """Build the parser of a run: every key of RunConfig, and the sections of the options that are named."""
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(
        prog=prog,
        usage="%(prog)s [--config FILE] [--KEY VALUE ...]",  # the whole list follows, with explanations
        exit_on_error=False,
        allow_abbrev=False,
        description="Train a referring image segmentation model. A --config file holds what is listed here; any value "
        "can be given on the command line as well, e.g. --model.name caris_swin_base --method supervised "
        "--train.global_batch_size 16. The options of a training method are the section of its name: add --method NAME "
        "to this --help to see them. Without a --config, flags change the quickstart; with one, the defaults here. "
        "--processes N starts N processes, --accelerate FILE uses a file of `accelerate config`, --estimate tells what "
        "the run will cost (memory, hours) and ends, --job FLAVOR starts it on Hugging Face Jobs (--hub.repo user/name "
        "keeps it; --job_timeout 24h, --job_image IMAGE). The keys that people change are listed; `--help all` lists "
        "every key.",
    )
    parser.add_argument("--config", action="config", help="YAML file or shipped config; several are layered.")
    parser.add_class_arguments(RunConfig, skip=set(DERIVED))
    for name, kind in options.items():
        if fields(kind):
            parser.add_class_arguments(kind, name)
    return parser


def one_line(message: str, parser: ArgumentParser) -> str:
    """Jsonargparse's paragraph as a sentence that names the key, and the nearest key that exists."""
    unknown = re.search(r"unrecognized arguments: (?:--)?([^\s=]+)|Option '([^']+)' is not accepted", message)
    nested = re.search(r"Group '([^']+)' does not accept (?:option|nested key) '([^']+)'", message)
    key: str | None = None
    if nested:
        key = ".".join(nested.groups())
    elif unknown:
        key = next(k for k in unknown.groups() if k)
    stray = re.search(r"unrecognized arguments: (?!--)(\S+)", message)
    keys = [action.dest for action in parser._actions if action.dest != "help"]
    if stray:
        option = "--config" if "train.epochs" in keys else "--checkpoint"
        return f"unexpected argument {stray[1][:100]}; did you mean {option} {stray[1][:100]}?"
    if key is not None:
        if key in USUAL_NAMES and key not in keys:
            return f"unknown key {key}; {USUAL_NAMES[key]}"
        close = nearest_keys(key, keys)
        if key in close:  # an option of a method, and the command trains none
            return f"{key} is a key of training, not of this command; leave it out"
        return f"unknown key {key[:100]}" + (f"; did you mean {' or '.join(close)}?" if close else "; see --help")
    value = re.search(r'key "([^"]+)":(.*)(?:Given value: |Got value: )([^\n]*)', message, re.DOTALL)
    if value:
        key, reasons, given = value.groups()
        choices = re.findall(r"Literal\[([^\]]*)\]", reasons)
        types = re.findall(r"Expected an? <class '(\w+)'>", reasons)
        expected = list(dict.fromkeys([*choices, *types])) or [reasons.strip(" .\n")]
        sentence = f"{key}: {given} does not fit; expected {' or '.join(expected).replace('NoneType', 'null')}"
        return sentence + (f", e.g. '[{given}]'" if "list" in types and given[:1] != "[" else "")
    group = re.search(r'key "([^"]+)":\s+Unable to load config \'([^\']+)\'', message)
    if group:
        name = f"{group[1]}.name"
        single = f"did you mean --{name} {group[2]}?" if name in keys else "set single keys"
        return f"{group[1]}: {group[2]} is not a group of keys; {single.rstrip('?')}, or give the file with --config"
    return " ".join(message.split())


def nearest_keys(key: str, keys: Sequence[str]) -> list[str]:
    """Keys that may be meant: the same name in a group, a typo, an option of an unused method, something like it.

    The methods' options are looked at only after the first two, because some import torch.
    """
    last = key.split(".")[-1]
    typos = difflib.get_close_matches(key, keys, n=2, cutoff=0.85)
    grouped = [known for known in keys if known.split(".")[-1] == last and "." not in key]
    return grouped[:3] or typos or find_option(last) or difflib.get_close_matches(key, keys, n=2, cutoff=0.6)


def _plain(value: Any, place: str = "") -> Any:
    """Tuples as lists, paths as text and numbers of NumPy as Python's, for YAML. Raises UserError for other types."""
    if isinstance(value, dict):
        return {key: _plain(entry, f"{place}.{key}" if place else str(key)) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(entry, place) for entry in value]
    if isinstance(value, Path):
        return str(value)
    if value is None or isinstance(value, (bool, str, date)):
        return value
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real):
        return float(value)
    raise UserError(f"{place} is of type {type(value).__name__}; give a number, a text, a list or a dictionary")


def _show_basic_keys(parser: ArgumentParser, options: Collection[str]) -> None:
    """Leave the keys that people change in `--help`, and the options of methods and augmentations that were named."""
    shown = {name for name, own in iter_keys(RunConfig) if own.metadata.get("basic")}
    for action in parser._actions:
        if action.dest not in (*shown, "help", "config") and action.dest.split(".")[0] not in options:
            action.help = argparse.SUPPRESS
    for group in parser._action_groups:
        if group.title and not any(action.help != argparse.SUPPRESS for action in group._group_actions):
            group.title = group.description = None


def reject_unused(flags: Iterable[str], used: Collection[str], registry: Registry[Any]) -> None:
    """Raise UserError for a command-line option of a section that the run does not use.

    flags: keys on the command line, without dashes, e.g. "aml.tau". Config files may contain such sections, because a
    file can be layered under another method.
    """
    names = registry.names()
    for key in flags:
        name, _, option = key.partition(".")
        if option and name in names and name not in used:
            uses = f"this run uses {', '.join(used)}" if used else "this run uses none"
            raise UserError(
                f"--{key} is an option of {registry.kind} {name}, and {uses}; leave it out or choose {name}"
            )


def find_option(key: str) -> list[str]:
    """Full keys, e.g. "aml.tau", of options called `key` in any section, for messages about unknown keys."""
    return [
        f"{name}.{key}"
        for registry in SECTIONED
        for name in registry.names()
        if key in getattr(registry.options(name), "__dataclass_fields__", {})
    ]


def config_schema() -> dict[str, Any]:
    """Build the JSON Schema of config files, for editors: it completes keys and marks mistakes while a file is written.

    Made from the config's types: all keys of a run, every method's and augmentation's section, `base`. No key is
    required, because a file can be layered under another.
    """
    options = {name: kind.options(name) for kind in SECTIONED for name in kind.names()}
    schema: dict[str, Any] = json.loads(build_run_parser("amltrain train", options).get_completion_script("jsonschema"))
    for group in schema["properties"].values():
        _drop_dialects(group)
    schema["title"] = "amltrain config"
    schema["description"] = "A run of `amltrain train`, or a layer of one."
    name = {"type": "string"}
    schema["properties"][BASE] = {
        "description": "Files or shipped configs that this file starts from. Later ones win; this file wins over all.",
        "anyOf": [name, {"type": "array", "items": name, "minItems": 1}],
    }
    schema["properties"][VARIANTS] = {
        "description": "Runs that change a few keys of this file, by name: FILE_NAME is such a run.",
        "type": "object",
        "additionalProperties": {"$ref": "#"},
    }
    for key, own in iter_keys(RunConfig):
        if "low" in own.metadata:
            _limit(_find(schema, key), own.metadata["low"], own.metadata["high"])
    _find(schema, "method")["enum"] = METHODS.names()
    _find(schema, "model.name")["enum"] = MODELS.names()
    _find(schema, "data.augment")["items"] = {"enum": AUGMENTATIONS.names()}
    return schema


def _drop_dialects(group: dict[str, Any]) -> None:
    """Leave `$schema` at the top alone."""
    properties = group.get("properties", {})
    properties.pop(DIALECT, None)
    for value in properties.values():
        _drop_dialects(value)


def _find(schema: dict[str, Any], key: str) -> dict[str, Any]:
    for part in key.split("."):
        schema = schema["properties"][part]
    return schema


def _limit(value: dict[str, Any], low: float, high: float) -> None:
    """Add a number's range; of a list, to its entries. JSON Schema ignores it for null."""
    if low == POSITIVE:
        limits: dict[str, Any] = {"exclusiveMinimum": 0}
    else:
        limits = {"minimum": low}
    if high != ANY:
        limits["maximum"] = high
    for item in _numbers(value):
        item.update(limits)


def _numbers(value: dict[str, Any]) -> list[dict[str, Any]]:
    """Every place in a value's schema that takes a number."""
    kinds = value.get("type", [])
    if {"number", "integer"} & set([kinds] if isinstance(kinds, str) else kinds):
        return [value]
    inner = [*value.get("anyOf", []), *value.get("prefixItems", [])]
    if isinstance(value.get("items"), dict):
        inner.append(value["items"])
    return [found for item in inner for found in _numbers(item)]
