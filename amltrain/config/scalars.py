"""Values of a config file that YAML 1.1 reads as something else than people mean: rejected, or read as they are meant.

23:50          1430, in base 60: rejected
010, 08        8 (octal) and a text: rejected; `"010"` in quotes is a text
no, off, yes   false and true; where a key takes a text, the word itself
~/runs         the home folder; `~` alone is null in YAML and stays that
$SCRATCH/x     the variable's value; rejected where it is not set
"""

import os
import re
from collections.abc import Callable, Sequence
from typing import Any, get_args, get_origin, get_type_hints

import yaml

from amltrain.errors import UserError

_TEXT = "tag:yaml.org,2002:str"
_BOOL = "tag:yaml.org,2002:bool"
_BASE_60 = re.compile(r"[-+]?\d[\d_]*(:[0-5]?\d)+(\.[\d_]*)?")
_LEADING_ZERO = re.compile(r"[-+]?0[\d_]+")
_VARIABLE = re.compile(r"\$(?:\{(\w+)\}|(\w+))")
_STARTS_A_PATH = re.compile(r"(~/|\$\{?[A-Za-z_]\w*\}?(/|$))")


def plain_scalar(node: yaml.ScalarNode, kind: Any, where: str) -> None:
    """Check one value of a config file, and change it where YAML would lose what was meant.

    kind: the key's type, None where it is not known. where: file, line and key. Raises UserError.
    """
    if node.style is None:
        if _BASE_60.fullmatch(node.value) and node.tag != _TEXT:
            raise UserError(
                f"{where}: YAML reads {node.value} in base 60, as {_in_base_60(node.value):g}; write one number (hours "
                f"as {_hours(node.value)}), or put a text in quotes"
            )
        if _LEADING_ZERO.fullmatch(node.value):
            number = node.value.lstrip("+-0_") or "0"
            raise UserError(
                f'{where}: YAML may read {node.value} as an octal number; write {number}, or "{node.value}" as a text'
            )
        if node.tag == _BOOL and _takes_word(kind, node.value):
            node.tag = _TEXT
    if node.tag == _TEXT:
        node.value = expand(node.value, where)


def expand(value: str, where: str) -> str:
    """A path that starts with `~/` or a variable, written out. Raises UserError for a variable that is not set."""
    if not _STARTS_A_PATH.match(value):
        return value
    if value.startswith("~/"):
        value = os.path.expanduser("~") + value[1:]
    missing = [name for pair in _VARIABLE.findall(value) if (name := pair[0] or pair[1]) not in os.environ]
    if missing:
        raise UserError(
            f"{where}: {value} names the variable {missing[0]}, which is not set; set it, or write the path"
        )
    return _VARIABLE.sub(lambda match: os.environ[match[1] or match[2]], value)


def expand_arguments(arguments: Sequence[str]) -> list[str]:
    """`--key=~/runs` with the home folder written out: a shell expands `~` only at the start of a word."""
    expanded = []
    for argument in arguments:
        key, given, value = argument.partition("=")
        if given and key.startswith("--") and value.startswith("~/"):
            argument = f"{key}={expand(value, key)}"
        expanded.append(argument)
    return expanded


def check_flags(arguments: Sequence[str], kinds: Callable[[str], Any]) -> None:
    """Raise UserError for a flag's number in base 60. kinds: the type of a key, None where it is not known."""
    for flag, following in zip(arguments, [*arguments[1:], ""], strict=True):
        key, given, value = flag.partition("=")
        value = value if given else following
        if key.startswith("--") and _BASE_60.fullmatch(value) and _is_number(kinds(key[2:])):
            number, hours = _in_base_60(value), _hours(value)
            raise UserError(f"{key}: {value} would be {number:g}, in base 60; write one number (hours as {hours})")


def _is_number(kind: Any) -> bool:
    options = get_args(kind) or (kind,)
    return str not in options and bool({int, float} & set(options))


def field_types(kind: Any) -> dict[str, Any]:
    """The types of a dataclass's fields; nothing for another type."""
    try:
        return get_type_hints(kind) if isinstance(kind, type) else {}
    except (NameError, TypeError):
        return {}


def _takes_word(kind: Any, word: str) -> bool:
    """Whether a key's type has the word among its values, and is not a truth value."""
    options = [option for part in (get_args(kind) or (kind,)) for option in (get_args(part) or (part,))]
    return (
        kind is not None
        and bool not in options
        and (word in options or str in options)
        and get_origin(kind) is not list
    )


def _in_base_60(text: str) -> float:
    value = 0.0
    for part in text.replace("_", "").split(":"):
        value = value * 60 + float(part)
    return value


def _hours(text: str) -> str:
    parts = [float(part) for part in text.replace("_", "").split(":")]
    return f"{sum(part / 60**place for place, part in enumerate(parts)):.2f}"
