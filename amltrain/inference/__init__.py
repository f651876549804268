"""Use a trained model: predictor, evaluation, demo, exported files."""

FORMATS = ("torch", "onnx")
"""Of exported models."""
