"""Reads a run from a command line and config files. The only file that knows the config library (jsonargparse)."""

import difflib
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentParser, set_parsing_settings

from amltrain.config.files import check_config_files, groups_of
from amltrain.config.schema import RunConfig
from amltrain.errors import UserError


def parse_config(argv: Sequence[str] | None = None, *, prog: str = "launch/train.py") -> RunConfig:
    """Read a run from a command line: `--config` files (later ones win, values may be paths of part files), then flags.

    Raises UserError for a key or a value that does not fit, naming it. `--help` and `--print_config` print and exit.
    """
    check_config_files(sys.argv[1:] if argv is None else argv, groups_of(RunConfig))
    parser = _parser(prog)
    try:
        parsed = parser.instantiate(parser.parse_args(argv))
    except UserError:
        raise
    except Exception as error:  # jsonargparse raises its own kinds; all of them are about what was typed
        raise UserError(one_line(str(error), parser)) from error
    return RunConfig(**{f.name: parsed[f.name] for f in fields(RunConfig)})


def save_config(config: RunConfig, path: Path) -> None:
    """Write a run so that `--config PATH` repeats it."""
    path.write_text(yaml.safe_dump(_plain(asdict(config)), sort_keys=False))


def _parser(prog: str) -> ArgumentParser:
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(
        prog=prog,
        exit_on_error=False,
        allow_abbrev=False,
        description="Train a referring image segmentation model. A --config file holds what is listed here; any value "
        "can be given on the command line as well, e.g. --model.name caris_swin_base --aml.enabled false "
        "--train.global_batch_size 16. Without a --config it is configs/quickstart.yaml that the flags change, "
        "with one the defaults listed here.",
    )
    parser.add_argument("--config", action="config", help="YAML file with a run; give several to layer them.")
    parser.add_class_arguments(RunConfig)
    return parser


def one_line(message: str, parser: ArgumentParser) -> str:
    """jsonargparse's paragraph as a sentence that names the key, and the nearest key that exists."""
    unknown = re.search(r"unrecognized arguments: (?:--)?([^\s=]+)|Option '([^']+)' is not accepted", message)
    nested = re.search(r"Group '([^']+)' does not accept (?:option|nested key) '([^']+)'", message)
    if unknown or nested:
        key = ".".join(nested.groups()) if nested else next(k for k in unknown.groups() if k)  # type: ignore[union-attr]
        keys = [action.dest for action in parser._actions if action.dest != "help"]
        close = difflib.get_close_matches(key, keys, n=2, cutoff=0.6)
        return f"unknown key {key}" + (f"; did you mean {' or '.join(close)}?" if close else "; see --help")
    value = re.search(r'key "([^"]+)":(.*)(?:Given value: |Got value: )([^\n]*)', message, re.DOTALL)
    if value:
        key, reasons, given = value.groups()
        choices = re.findall(r"Literal\[([^\]]*)\]", reasons)
        types = re.findall(r"Expected an? <class '(\w+)'>", reasons)
        expected = list(dict.fromkeys([*choices, *types])) or [reasons.strip(" .\n")]
        sentence = f"{key}: {given} does not fit; expected {' or '.join(expected).replace('NoneType', 'null')}"
        return sentence + (f", e.g. '[{given}]'" if "list" in types and given[:1] != "[" else "")
    part = re.search(r'key "([^"]+)":\s+Unable to load config \'([^\']+)\'', message)
    if part:
        return "{}: {} is no part file that can be read; give a YAML file's path, or single keys".format(*part.groups())
    return " ".join(message.split())


def _plain(value: Any) -> Any:
    """Tuples as lists, for YAML."""
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    return [_plain(entry) for entry in value] if isinstance(value, (list, tuple)) else value
