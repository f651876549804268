"""Partial types: what a run overrides of something that is complete.

A complete type is a frozen dataclass in which every field has a value. Its partial type has the same fields, each
optional and null by default, with the same help texts, so no field is written twice:

    @partial_of(Protocol)
    class ProtocolOverrides(Partial):
        ""\"What a run changes of a model's protocol.""\"
"""

from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, TypeVar, get_type_hints

import docstring_parser

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
