r"""What a config is made of: keys with their range and scope, partial types, plain YAML values.

Partial types: what a run overrides of something that is complete.

A complete type is a frozen dataclass in which every field has a value. Its partial type has the same fields, each
optional and null by default, with the same help texts, so no field is written twice:

    @partial_of(Protocol)
    class ProtocolOverrides(Partial):
        # a docstring of its own

Values of a config file that YAML 1.1 reads as something else than people mean: rejected, or read as they are meant.

23:50          1430, in base 60: rejected
010, 08        8 (octal) and a text: rejected; `"010"` in quotes is a text
no, off, yes   false and true; where a key takes a text, the word itself
~/runs         the home folder; `~` alone is null in YAML and stays that
$SCRATCH/x     the variable's value; rejected where it is not set
"""

import math
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields, is_dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar, get_args, get_origin, get_type_hints

import docstring_parser
import yaml

from amltrain.errors import UserError, fits, type_name

Complete = TypeVar("Complete")
Kind = TypeVar("Kind", bound="Partial")


@dataclass
class Partial:
    """Base of partial types. A type checker sees any field; the dataclass that `partial_of` makes has the real ones."""

    if TYPE_CHECKING:

        def __init__(self, **values: Any) -> None: ...

        def __getattr__(self, name: str) -> Any: ...


def partial_of(complete: type) -> Callable[[type[Kind]], type[Kind]]:
    """Give a subclass of `Partial` every field of the dataclass `complete`, optional and None by default."""

    def fill(partial: type[Kind]) -> type[Kind]:
        hints, texts = get_type_hints(complete), help_texts(complete)
        lines = [(partial.__doc__ or "").strip(), ""]
        partial.__annotations__ = {own.name: hints[own.name] | None for own in fields(complete)}
        for own in fields(complete):
            setattr(partial, own.name, field(default=None, metadata=own.metadata))
            lines.append(f":param {own.name}: {texts.get(own.name, '')}")
        partial.__doc__ = "\n".join(lines)
        return dataclass(partial)

    return fill


def help_texts(kind: type) -> dict[str, str]:
    """The docstring under each field of a dataclass, by field name, on one line."""
    parsed = docstring_parser.parse_from_object(kind)
    return {param.arg_name: " ".join((param.description or "").split()) for param in parsed.params}


def override(complete: Complete, partial: Partial | None) -> Complete:
    """`complete` with every field that `partial` sets (is not None)."""
    if partial is None:
        return complete
    values = {own.name: getattr(partial, own.name) for own in fields(partial)}
    return replace(complete, **{name: value for name, value in values.items() if value is not None})  # type: ignore[type-var]  # a dataclass


ANY = math.inf
POSITIVE = math.nextafter(0.0, 1.0)
FREE, SAID, LOCAL = "free", "said", "local"
"""Scopes of keys. FREE: does not affect the numbers; a resumed run may change it. SAID: does, but a resumed run may
change it, with a warning. LOCAL: belongs to this machine or this start, and is not part of the recipe."""


def key(
    default: Any = MISSING,
    *,
    default_factory: Any = MISSING,
    low: float | None = None,
    high: float = ANY,
    scope: str | None = None,
    basic: bool = False,
) -> Any:
    """Declare a key of a config: its default, range, scope, and whether the short `--help` shows it.

    low, high: of the number, or of each entry of a list; None = no range. scope: None = a resumed run may not change
    it.
    """
    known = {"scope": scope, "basic": basic or None, **({} if low is None else {"low": low, "high": high})}
    metadata = {name: value for name, value in known.items() if value is not None}
    if default_factory is not MISSING:
        return field(default_factory=default_factory, metadata=metadata)
    return field(default=default, metadata=metadata)


LARGEST = 2.0**63
"""Numbers beyond it fit no counter of a library."""


def check_number(key: str, value: float | None, low: float, high: float) -> None:
    """Raise UserError, naming the key, if a number lies outside its range, is NaN or infinite."""
    if value is None or (low <= value <= high and abs(value) <= LARGEST):
        return
    if value == ANY:
        wanted = "be finite"
    elif isinstance(value, int) and abs(value) > LARGEST:
        raise UserError(f"{key} is an integer that no counter holds; give one below {LARGEST:.0e}")
    elif low == POSITIVE:
        wanted = "be more than 0"
    elif high == ANY:
        wanted = f"be at least {low:g}"
    else:
        wanted = f"lie between {low:g} and {high:g}"
    raise UserError(f"{key} is {value} and must {wanted}")


def iter_keys(kind: type, prefix: str = "") -> Iterator[tuple[str, Field[Any]]]:
    """Yield ("train.epochs", its field) for every key of a config's dataclass, groups before their keys."""
    hints = get_type_hints(kind)
    for own in fields(kind):
        yield f"{prefix}{own.name}", own
        if is_dataclass(hints[own.name]):
            yield from iter_keys(hints[own.name], f"{prefix}{own.name}.")


def keys_of_scope(kind: type, scope: str) -> tuple[str, ...]:
    """Keys and groups of keys whose scope is this one."""
    return tuple(name for name, own in iter_keys(kind) if own.metadata.get("scope") == scope)


def check_types(config: Any) -> None:
    """Raise UserError for the first value of a run that is not of its key's type, null included."""
    for name, _ in iter_keys(type(config)):
        value, kind = config, type(config)
        for part in name.split("."):
            value, kind = getattr(value, part), get_type_hints(kind)[part]
        if not fits(value, kind):
            raise UserError(f"{name} must be {type_name(kind)}, not {'null' if value is None else repr(value)}")


def check_ranges(config: Any) -> None:
    """Raise UserError for the first number of a run outside its range. null is allowed where the key allows it."""
    for name, own in iter_keys(type(config)):
        if "low" not in own.metadata:
            continue
        value = config
        for part in name.split("."):
            value = getattr(value, part)
        for number in value if isinstance(value, (list, tuple)) else [value]:
            if not isinstance(number, str):  # a word that the key takes instead, e.g. checkpoint.keep: all
                check_number(name, number, own.metadata["low"], own.metadata["high"])


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
    for flag, following in zip(arguments, [*arguments[1:], ""], strict=False):
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
