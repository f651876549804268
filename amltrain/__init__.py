"""amltrain: referring image segmentation on HuggingFace Accelerate, with alignment-aware masked learning (AML)."""

__version__ = "0.1.0"
