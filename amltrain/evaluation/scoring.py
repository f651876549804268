"""One batch: masks in the frame of the protocol, and pixels counted against the ground truth."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from amltrain.config.schema import Protocol
from amltrain.errors import UserError
from amltrain.evaluation.masks import network_probability, original_probability
from amltrain.records import Batch, ModelOutput


class Masks(NamedTuple):
    """Predicted masks of a batch.

    masks      B bool tensors in the protocol's frame: [H, W] at network size, or [h0, w0] at each image's own size
    no_target  [B] bool, "the sentence refers to nothing here"; None where neither a head nor a file gives it
    finite     [B] bool, the logits were finite
    """

    masks: Sequence[Tensor]
    no_target: Tensor | None
    finite: Tensor


def network_size(batch: Batch) -> tuple[int, int]:
    """Height and width of the network input."""
    return batch.image.shape[-2], batch.image.shape[-1]


def output_masks(output: ModelOutput, batch: Batch, geometry: Sequence[Sequence[float]], protocol: Protocol) -> Masks:
    """Turn a model's output into masks.

    geometry: rows of `Batch.geometry` as Python numbers, so that nothing waits for the device.
    """
    size = network_size(batch)
    if protocol.frame == "network":
        masks = list(network_probability(output.logits, size, protocol.interpolation) > protocol.threshold)
    else:
        maps = original_probability(output.logits, size, geometry, protocol.interpolation)
        masks = [probability > protocol.threshold for probability in maps]
    head = output.aux.get("no_target")
    return Masks(masks, None if head is None else head.argmax(1) == 1, output.logits.isfinite().flatten(1).all(1))


def count_pixels(predicted: Masks, batch: Batch, protocol: Protocol) -> Tensor:
    """Return a row of `SAMPLE_COLUMNS` per sample, [B, 7] int64 on the device of the masks."""
    if protocol.frame == "network":
        pairs = zip(predicted.masks, batch.target > 127, strict=True)
    elif len(batch.original_target) == len(predicted.masks):
        pairs = zip(predicted.masks, (truth > 0 for truth in batch.original_target), strict=True)
    else:
        raise UserError('protocol.frame="original" needs a loader that gives the masks at their original size')
    pixels = torch.stack([torch.stack([(m & t).sum(), (m | t).sum(), m.sum()]) for m, t in pairs])
    area = pixels[:, 2]
    no_target = area < (protocol.no_target_pixels or 0) if predicted.no_target is None else predicted.no_target
    columns = (batch.sample_id, pixels[:, 0], pixels[:, 1], batch.no_target, no_target, predicted.finite, area)
    return torch.stack([c.to(pixels.device, torch.int64) for c in columns], dim=1)
