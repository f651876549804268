"""Models, one file per family; `amltrain.registry.MODELS` names the file of each."""

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
