"""Encoders that several baselines share, on timm and transformers, under the official key names."""
