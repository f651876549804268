"""Registered models. Importing this package fills the registry; a new baseline adds one file and one line here."""

from amltrain.models import (  # noqa: F401 - they register their models
    barleria,
    beit3,
    c3vg,
    caris,
    cgformer,
    cris,
    deris,
    detris,
    dual,
    etris,
    evfsam,
    lavt,
    magnet,
    rela,
    remamber,
    sam3,
)
from amltrain.models.base import Conversion, RISModel, check_param_groups
from amltrain.models.registry import ModelInfo, create_model, list_models, model_builder, model_info, register_model

__all__ = [
    "Conversion",
    "ModelInfo",
    "RISModel",
    "check_param_groups",
    "create_model",
    "list_models",
    "model_builder",
    "model_info",
    "register_model",
]
