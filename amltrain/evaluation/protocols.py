"""How each release scores its test split, by name (`--preset`). They differ in these options only; the formulas are in
`metrics`, the way from logits to a mask in `masks`."""

from dataclasses import dataclass, fields, replace
from typing import Literal

from amltrain.config import ProtocolConfig
from amltrain.errors import UserError, unknown_name

_NETWORK = ProtocolConfig(
    frame="network", threshold=0.5, interpolation="bilinear", sentences="all", ties="ge", no_target_pixels=0
)
_CRIS = ProtocolConfig(
    frame="original", threshold=0.35, interpolation="bicubic", sentences="all", ties="gt", no_target_pixels=0
)
_CGFORMER = ProtocolConfig(
    frame="original", threshold=0.5, interpolation="bicubic", sentences="all", ties="gt", no_target_pixels=0
)

PROTOCOLS: dict[str, ProtocolConfig] = {
    "lavt": _NETWORK,
    "caris": _NETWORK,
    "rela": _NETWORK,
    "polyformer": _NETWORK,
    "cris": _CRIS,
    "etris": _CRIS,
    "detris": _CRIS,
    "cgformer": _CGFORMER,
}


def named_protocol(name: str) -> ProtocolConfig:
    """A copy of a release's complete protocol. Raises UserError for an unknown name."""
    if name not in PROTOCOLS:
        raise unknown_name("evaluation preset", name, PROTOCOLS)
    return replace(PROTOCOLS[name])


@dataclass(frozen=True)
class Rule:
    """A ProtocolConfig with nothing left open; the fields mean what they mean there."""

    frame: Literal["network", "original"]
    threshold: float
    interpolation: Literal["bilinear", "bicubic"]
    sentences: Literal["all", "first"]
    ties: Literal["ge", "gt"]
    no_target_pixels: int


def complete(protocol: ProtocolConfig) -> Rule:
    """The protocol as a rule. Raises UserError naming the first field that neither the model nor the run has set.

    no_target_pixels alone may be null: it is 0 for every release.
    """
    values = {f.name: getattr(protocol, f.name) for f in fields(protocol)}
    values["no_target_pixels"] = values["no_target_pixels"] or 0
    for name, value in values.items():
        if value is None:
            raise UserError(f"evaluation.protocol.{name} is not set, neither by the model nor by the run; set it")
    if not 0 < values["threshold"] < 1:
        raise UserError(f"evaluation.protocol.threshold={values['threshold']} must lie between 0 and 1")
    return Rule(**values)
