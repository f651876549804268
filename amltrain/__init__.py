"""amltrain: referring image segmentation on HuggingFace Accelerate, with alignment-aware masked learning (AML).

from amltrain import Predictor, create_model, decode_mask, list_models, load_pretrained
"""

import importlib
import sys
from types import ModuleType
from typing import Any

__version__ = "0.2.0"

_EXPORTS = {
    "train": "amltrain.api",
    "finetune": "amltrain.finetune",
    "prepare": "amltrain.api",
    "evaluate": "amltrain.api",
    "compare": "amltrain.api",
    "report": "amltrain.api",
    "export": "amltrain.api",
    "read_config": "amltrain.api",
    "UserError": "amltrain.errors",
    "Callback": "amltrain.training.run",
    "register_model": "amltrain.models.registry",
    "register_method": "amltrain.methods.base",
    "register_masker": "amltrain.methods.base",
    "register_augmentation": "amltrain.data.augment",
    "register_metric": "amltrain.evaluation.metrics",
    "register_loss": "amltrain.losses",
    "register_dataset": "amltrain.data.catalog",
    "register_reader": "amltrain.data.sources.annotations",
    "register_callback": "amltrain.training.callbacks",
    "Predictor": "amltrain.inference.predictor",
    "create_model": "amltrain.models.registry",
    "list_models": "amltrain.models.registry",
    "decode_mask": "amltrain.data.segmentation",
    "load_pretrained": "amltrain.hub.model_folder",
    "save_pretrained": "amltrain.hub.model_folder",
}

__all__ = ["__version__", *_EXPORTS]


def __getattr__(name: str) -> Any:
    """Import a public name on first use, so that `import amltrain` stays fast."""
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_EXPORTS[name]), name)


class _Package(ModuleType):
    """The package itself. Its functions `report` and `finetune` have the names of modules, which would replace them."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _EXPORTS and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
