"""Segmentation losses: `loss(output, batch) -> {"loss": scalar, ...}`; a baseline's registry entry names its own."""
