"""Partial types: what a run overrides of something that is complete.

A complete type is a frozen dataclass in which every field has a value. Its partial type has the same fields, each
optional and null by default, with the same help texts, so no field is written twice:

    @partial_of(Protocol)
    class ProtocolOverrides(Partial):
        ""\"What a run changes of a model's protocol.""\"

The range of every number in a run's config; AML's, which depend on its preset, are checked with the preset.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, TypeVar, get_type_hints

import docstring_parser

from amltrain.errors import UserError

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

RANGES: dict[str, tuple[float, float]] = {
    "seed": (0, 2**32 - 1),
    "data.workers": (0, ANY),
    "data.max_skipped": (0, 1),
    "data.shapes.train": (1, ANY),
    "data.shapes.evaluation": (1, ANY),
    "data.shapes.size": (16, ANY),  # amltrain.data.sources.shapes.SMALLEST_SCENE
    "data.shapes.seed": (0, ANY),
    "preprocess.size": (1, ANY),
    "preprocess.max_tokens": (1, ANY),
    "optim.lr": (0, ANY),
    "optim.weight_decay": (0, ANY),
    "optim.betas": (0, math.nextafter(1.0, 0.0)),
    "optim.eps": (0, ANY),
    "optim.power": (0, ANY),
    "optim.warmup_steps": (0, ANY),
    "optim.milestones": (0, 1),
    "optim.gamma": (0, ANY),
    "optim.clip_norm": (POSITIVE, ANY),
    "train.epochs": (1, ANY),
    "train.max_steps": (1, ANY),
    "train.stop_after": (1, ANY),
    "train.global_batch_size": (1, ANY),
    "train.micro_batch_size": (1, ANY),
    "train.ema_decay": (0, 1),
    "train.log_every": (1, ANY),
    "train.limit_samples": (1, ANY),
    "train.profile": (1, ANY),
    "train.loader_timeout": (POSITIVE, ANY),
    "train.max_bad_steps": (1, ANY),
    "train.collective_timeout": (POSITIVE, ANY),
    "train.time_limit": (0, ANY),
    "evaluation.every_steps": (1, ANY),
    "evaluation.batch_size": (1, ANY),
    "evaluation.patience": (1, ANY),
    "evaluation.max_samples": (1, ANY),
    "evaluation.pictures": (0, ANY),
    "evaluation.protocol.threshold": (0, 1),
    "evaluation.protocol.no_target_pixels": (0, ANY),
    "checkpoint.every_steps": (1, ANY),
    "checkpoint.keep": (1, ANY),
}
"""Lowest and highest value by key; of a list, of each entry. null is always allowed where the key allows it."""


def check_number(key: str, value: float | None, low: float, high: float) -> None:
    """Raise UserError, naming the key, if a number lies outside its range or is NaN."""
    if value is None or low <= value <= high:
        return
    if low == POSITIVE:
        wanted = "be more than 0"
    elif high == ANY:
        wanted = f"be at least {low:g}"
    else:
        wanted = f"lie between {low:g} and {high:g}"
    raise UserError(f"{key} is {value} and must {wanted}")


def check_ranges(config: Any) -> None:
    """Raise UserError for the first number of a RunConfig outside its range."""
    for key, (low, high) in RANGES.items():
        value = config
        for part in key.split("."):
            value = getattr(value, part)
        for number in value if isinstance(value, (list, tuple)) else [value]:
            if not isinstance(number, str):  # a word that the key takes instead, e.g. checkpoint.keep: all
                check_number(key, number, low, high)
