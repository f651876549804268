"""The `--config` files of a command line, checked before the config library reads them: it would not say which file it
stumbled over, and of a key that is given twice it would quietly take the last value."""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import yaml

from amltrain.errors import UserError

Groups = Mapping[str, type]
"""Keys whose value is a group of keys, or the path of a part file that holds them, and the dataclass of each."""
TEXT = "tag:yaml.org,2002:str"


def groups_of(kind: type) -> Groups:
    """The groups of a dataclass: its fields that are dataclasses; none for another type."""
    if not is_dataclass(kind):
        return {}
    return {f.name: f.type for f in fields(kind) if isinstance(f.type, type) and is_dataclass(f.type)}


def check_config_files(arguments: Sequence[str], groups: Groups) -> None:
    """Raise UserError for a `--config` file, or a part file that it names, that is no YAML mapping of single keys."""
    for name in config_names(arguments):
        if name not in (None, "-") and not Path(name).is_fifo():  # a pipe can be read only once
            _check_file(Path(name).expanduser(), groups, "--config")


def _check_file(path: Path, groups: Groups, asked_by: str) -> None:
    try:
        content = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except OSError as error:
        raise UserError(
            f"{asked_by}: could not read {path} ({error.strerror}); give the path of a YAML file"
        ) from error
    except UnicodeDecodeError as error:
        raise UserError(f"{asked_by}: {path} is no text in UTF-8; give a YAML file") from error
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise UserError(f"{path}{line} is no YAML: {error.problem}") from error
    except yaml.YAMLError as error:
        raise UserError(f"{path} is no YAML: {' '.join(str(error).split())}") from error
    if content is None:
        raise UserError(f"{asked_by}: {path} is empty; give a file with keys and values, or leave it out")
    if not isinstance(content, yaml.MappingNode):
        raise UserError(f"{asked_by}: {path} holds no keys; its lines should look like `seed: 0`")
    _check_keys(content, groups, path, "")


def _check_keys(mapping: yaml.MappingNode, groups: Groups, path: Path, prefix: str) -> None:
    """prefix: the groups that the mapping is in, `model.`"""
    seen: dict[str, int] = {}
    for key, value in mapping.value:
        name, line = f"{prefix}{key.value}", key.start_mark.line + 1
        if name in seen:
            raise UserError(f"{path}, line {line}: {name} is already given in line {seen[name]}; keep one of them")
        seen[name] = line
        group = groups.get(str(key.value))
        inner = groups_of(group) if group else {}
        if isinstance(value, yaml.MappingNode):
            _check_keys(value, inner, path, f"{name}.")
        elif group and isinstance(value, yaml.ScalarNode) and value.tag == TEXT:
            _check_file(path.parent / Path(value.value).expanduser(), inner, f"{path}, line {line}, {name}")


def read_flags(arguments: Sequence[str]) -> dict[str, str]:
    """The flags of a command line by key, without dashes; the last of a key wins, a flag without a value has ""."""
    flags: dict[str, str] = {}
    for number, argument in enumerate(arguments):
        if argument.startswith("--") and len(argument) > 2:
            key, given, value = argument[2:].partition("=")
            following = arguments[number + 1] if number + 1 < len(arguments) else ""
            flags[key] = value if given else "" if following.startswith("--") else following
    return flags


def top_level(arguments: Sequence[str]) -> dict[str, Any]:
    """The top-level keys of all `--config` files, later files over earlier ones. Call `check_config_files` first."""
    values: dict[str, Any] = {}
    for name in config_names(arguments):
        if name not in (None, "-") and not Path(name).is_fifo():
            values |= yaml.safe_load(Path(name).expanduser().read_text(encoding="utf-8"))
    return values


def config_names(arguments: Sequence[str]) -> list[str]:
    """What `--config` names, in order."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config", action="append", nargs="?", default=[])
    return parser.parse_known_args(arguments)[0].config
