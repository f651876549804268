"""How each release scores its test split, by name (`--preset`), as its models in the registry say. They differ in these
options only; the formulas are in `metrics`, the way from logits to a mask in `masks`."""

from dataclasses import dataclass, fields, replace
from typing import Literal

from amltrain.config.schema import DataConfig, MaskParts, ProtocolConfig, override
from amltrain.errors import UserError, unknown_name
from amltrain.models import list_models, model_info

PROTOCOLS: dict[str, ProtocolConfig] = {
    name.partition("_")[0]: model_info(name).protocol
    for name in list_models()  # lavt_swin_base, lavt_tiny, ...: all models of a release are scored alike
}


def named_protocol(name: str) -> ProtocolConfig:
    """A copy of a release's complete protocol. Raises UserError for an unknown name."""
    if name not in PROTOCOLS:
        raise unknown_name("evaluation preset", name, PROTOCOLS)
    return replace(PROTOCOLS[name])


def run_protocol(own: ProtocolConfig, data: DataConfig, run: ProtocolConfig) -> ProtocolConfig:
    """The model's or a preset's own protocol, over it data.mask_parts, over that what the run sets."""
    return override(override(own, ProtocolConfig(mask_parts=data.mask_parts)), run)


@dataclass(frozen=True)
class Rule:
    """A ProtocolConfig with nothing left open; the fields mean what they mean there."""

    frame: Literal["network", "original"]
    threshold: float
    interpolation: Literal["bilinear", "bicubic"]
    sentences: Literal["all", "first"]
    ties: Literal["ge", "gt"]
    mask_parts: MaskParts
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
