"""Evaluation protocols that several models share; a model's registry entry names one of them."""

from dataclasses import replace

from amltrain.config.schema import Protocol

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
