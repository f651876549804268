"""How each official repository scores its test split, by name (`--preset`), as its models in the registry declare it.

They differ in these options only; the formulas are in `metrics`, the way from logits to a mask in `masks`.
"""

from amltrain.config.partial import override
from amltrain.config.ranges import check_number
from amltrain.config.schema import DataConfig, Preprocess, Protocol, ProtocolOverrides
from amltrain.errors import UserError, unknown_name
from amltrain.models import list_models, model_info

PROTOCOLS: dict[str, Protocol] = {
    name.partition("_")[0]: model_info(name).protocol
    for name in list_models()  # lavt_swin_base, lavt_tiny, ...: all models of a paper are scored alike
}


def named_protocol(name: str) -> Protocol:
    """The protocol of an official repository. Raises UserError for an unknown name."""
    if name not in PROTOCOLS:
        raise unknown_name("evaluation preset", name, PROTOCOLS)
    return PROTOCOLS[name]


def named_preprocess(name: str) -> Preprocess:
    """The preprocessing of an official repository's full-size model. Raises UserError for an unknown name."""
    if name not in PROTOCOLS:
        raise unknown_name("evaluation preset", name, PROTOCOLS)
    own = [model_info(model).preprocess for model in list_models() if model.partition("_")[0] == name]
    return max(own, key=lambda preprocess: preprocess.size)


def run_protocol(own: Protocol, data: DataConfig, run: ProtocolOverrides) -> Protocol:
    """Take the model's or a preset's protocol, then data.mask_parts, then what the run sets; the last one wins.

    Raises UserError for a threshold that decides nothing.
    """
    protocol = override(override(own, ProtocolOverrides(mask_parts=data.mask_parts)), run)
    check_number("evaluation.protocol.threshold", protocol.threshold, 0, 1)
    if protocol.threshold in (0, 1):
        raise UserError(f"evaluation.protocol.threshold={protocol.threshold} must lie between 0 and 1, both excluded")
    return protocol
