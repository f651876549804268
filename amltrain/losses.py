"""Segmentation losses: `loss(output, batch) -> {"loss": scalar, ...}`; a baseline names its own in its registry entry."""
