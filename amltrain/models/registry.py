"""Evaluation protocols that several models share; a model's registry entry names one of them.

The registry: a dict and a decorator. A registered model is a plain function named after the model.

@register_model(info=ModelInfo(paper=..., official_code=..., licence=..., preprocess=..., protocol=...))
def caris_swin_base(*, vision_weights: str | None = None, ...) -> CARIS: ...
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar, get_type_hints

from amltrain.config.schema import Preprocess, Protocol
from amltrain.errors import UserError, fits, type_name, unknown_name
from amltrain.models.base import RISModel
from amltrain.registry import MODELS

NETWORK_FRAME = Protocol(
    frame="network", threshold=0.5, interpolation="bilinear", sentences="all", ties="ge", mask_parts="union"
)
"""Two-channel argmax at the network's input size, as CARIS and ReLA score."""
NETWORK_FRAME_EXCLUSIVE = replace(NETWORK_FRAME, mask_parts="exclusive")
"""The same with overlapping polygons as background, as LAVT and MagNet score."""
LETTERBOX_UNDONE = Protocol(
    frame="original", threshold=0.35, interpolation="bicubic", sentences="all", ties="gt", mask_parts="union"
)
"""Sigmoid above 0.35 at the image's own size, as CRIS, ETRIS, DETRIS and BarLeRIa score."""


@dataclass(frozen=True)
class ModelInfo:
    """Facts about a model for the registry table, the model card and the loaders.

    preprocess and protocol are complete: a run's own values override them field by field.
    """

    paper: str
    official_code: str
    licence: str
    aml_scores: str
    preprocess: Preprocess
    protocol: Protocol
    loss: str
    loss_kwargs: dict[str, Any] = field(default_factory=dict)


Builder = TypeVar("Builder", bound=Callable[..., RISModel])


def register_model(info: ModelInfo) -> Callable[[Builder], Builder]:
    """Register a function that builds a model; the function's name is the model's name."""

    def register(builder: Builder) -> Builder:
        MODELS.add(builder.__name__, builder, info)
        return builder

    return register


def list_models() -> list[str]:
    """Names of all registered models, sorted."""
    return MODELS.names()


def model_info(name: str) -> ModelInfo:
    """Return the facts about a registered model. Raises UserError for an unknown name."""
    return MODELS[name].details


def model_builder(name: str) -> Callable[..., RISModel]:
    """Return the function that builds a registered model. Raises UserError for an unknown name."""
    return MODELS[name].value


TUNING = ("freeze", "lora")
"""Arguments of `create_model` that no builder sees."""


def without_tuning(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of `create_model` without TUNING."""
    return {key: value for key, value in kwargs.items() if key not in TUNING}


def create_model(name: str, **kwargs: Any) -> RISModel:
    """Build a registered model; `kwargs` are the builder's own keyword arguments.

    freeze, lora: for every model; see `amltrain.models.tuning.apply_tuning`. Raises UserError for an unknown name, and
    an argument that the builder does not take or that is of another type.
    """
    builder = model_builder(name)
    tuned, kwargs = {key: kwargs[key] for key in TUNING if key in kwargs}, without_tuning(kwargs)
    accepted = inspect.signature(builder).parameters
    for key in kwargs:
        if key not in accepted:
            error = unknown_name(f"argument of model {name}", key, accepted)
            raise UserError(f"{error} (model.kwargs.{key})")
    kinds = get_type_hints(builder)
    for key, value in kwargs.items():
        if key in kinds and not fits(value, kinds[key]):
            raise UserError(f"argument {key} of model {name} is {value!r}, not {type_name(kinds[key])}")
    model = builder(**kwargs)
    if any(tuned.values()):
        from amltrain.models.tuning import apply_tuning

        apply_tuning(model, tuned.get("freeze", []), tuned.get("lora", {}))
    return model
