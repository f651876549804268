"""From a model's logits to masks: at the network's input size, or at every image's own size.

Dimensions: B batch, h w logits, H W network input, h0 w0 original image.

Four ways, named by what is interpolated (the first three align_corners=True, to the input size first, as most official
code does):

    bilinear  the referent's margin (logit of referent - logit of background) is interpolated, then made a probability
              (LAVT, CARIS, ReLA); back to the original size bilinearly
    nearest   as bilinear up to the input size; back to the original size a pixel takes the nearest margin (ReMamber)
    bicubic   the probability is interpolated (CRIS, ETRIS, DETRIS, CGFormer); back to the original size bicubically
    cropped   as bilinear, by pixels' centres, and with the padding cut off first (SAM, GSVA, LISA); of resize `longest`

The way back follows the geometry of the sample. A stretched square is stretched back. A letterbox is undone by the
inverse affine map; bicubic then repeats OpenCV 4's `warpAffine` (a = -0.75, coordinates on a grid of 1/32 pixel, 0
outside), which the CRIS family's evaluation uses, to float rounding and without OpenCV.

This file decides what a model found, or that it found nothing; evaluation, predictor, report, figures and the ONNX
script (which repeats it without torch; a test compares them) all ask it.
"""

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from amltrain.config.schema import Protocol
from amltrain.errors import UserError
from amltrain.frames import from_longest
from amltrain.matching import box_overlap_areas, boxes_of_masks, corners_of, sides
from amltrain.records import Batch, ModelOutput

Interpolation = Literal["bilinear", "bicubic", "nearest", "cropped"]

_CUBIC_A = -0.75  # OpenCV's, and PyTorch's


def referent_margin(logits: Tensor) -> Tensor:
    """Logit of the referent against the background, [B, h, w] float32, from [B, 2 or 1, h, w] of any float dtype."""
    logits = logits.float()
    return logits[:, 1] - logits[:, 0] if logits.shape[1] == 2 else logits[:, 0]


def _network_values(logits: Tensor, size: tuple[int, int], interpolation: Interpolation) -> Tensor:
    """[B, H, W] float32: margins (bilinear) or probabilities (bicubic)."""
    values = referent_margin(logits)
    if interpolation == "bicubic":
        values = values.sigmoid()
    if values.shape[-2:] == size:
        return values
    mode = "bicubic" if interpolation == "bicubic" else "bilinear"
    return F.interpolate(values[:, None], size, mode=mode, align_corners=interpolation != "cropped")[:, 0]


def _probability(values: Tensor, interpolation: Interpolation) -> Tensor:
    return values if interpolation == "bicubic" else values.sigmoid()


def network_probability(logits: Tensor, size: tuple[int, int], interpolation: Interpolation = "bilinear") -> Tensor:
    """Probability of the referent at the network's input size (H, W).

    logits: [B, 2 or 1, h, w]. Returns [B, H, W] float32 in 0..1 (bicubic may overshoot by a little).
    """
    return _probability(_network_values(logits, size, interpolation), interpolation)


def original_probability(
    logits: Tensor,
    size: tuple[int, int],
    geometry: Sequence[Sequence[float]],
    interpolation: Interpolation = "bilinear",
) -> list[Tensor]:
    """Probability of the referent at each image's own size.

    logits: [B, 2 or 1, h, w]; size: (H, W); geometry: B rows of `Batch.geometry` as Python numbers, so that nothing
    waits for the device. Returns B tensors [h0, w0] float32.
    """
    values = _network_values(logits, size, interpolation)
    return [
        _probability(to_original(v, g, interpolation), interpolation) for v, g in zip(values, geometry, strict=True)
    ]


def to_original(values: Tensor, geometry: Sequence[float], interpolation: Interpolation) -> Tensor:
    """Bring a map at network size, [H, W] float, back to the image's own size, [h0, w0].

    geometry: one row of `Batch.geometry`.
    """
    height, width = values.shape
    h0, w0 = int(geometry[0]), int(geometry[1])
    if interpolation == "cropped":
        return from_longest(values, (h0, w0))
    scale_y, scale_x, offset_y, offset_x = geometry[2:]
    # S / h0 * h0 is not S in floating point for many h0, 427 among them
    stretched = math.isclose(scale_y * h0, height, rel_tol=1e-6) and math.isclose(scale_x * w0, width, rel_tol=1e-6)
    if stretched and offset_y == offset_x == 0:
        corners = None if interpolation == "nearest" else True
        return F.interpolate(values[None, None], (h0, w0), mode=interpolation, align_corners=corners)[0, 0]
    index, weight = _taps(h0, height, scale_y, offset_y, interpolation, values.device)
    rows = (values[index] * weight[..., None]).sum(1)  # [h0, W]
    index, weight = _taps(w0, width, scale_x, offset_x, interpolation, values.device)
    return (rows[:, index] * weight).sum(-1)  # [h0, w0]


def _taps(
    count: int, limit: int, scale: float, offset: float, interpolation: Interpolation, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return the input pixels (of `limit`) of each of `count` output pixels, [count, K] int64, and float32 weights."""
    start = offset + 0.5 * (scale - 1)  # from continuous coordinates to pixel indices
    position = torch.arange(count, device=device, dtype=torch.float64) * scale
    if interpolation == "bicubic":  # OpenCV rounds to 1/1024 pixel, then to 1/32
        fine = (position * 1024).round() + round(start * 1024)
        position = ((fine + 16) / 32).floor() / 32
    else:
        position = position + start
    first = position.floor()
    t = position - first
    if interpolation == "bilinear":
        steps, weight = torch.arange(0, 2, device=device), torch.stack([1 - t, t], dim=1)
    elif interpolation == "nearest":
        steps, weight = torch.arange(0, 2, device=device), torch.stack([t < 0.5, t >= 0.5], dim=1)
    else:
        steps = torch.arange(-1, 3, device=device)
        weight = torch.stack([_cubic(t + 1), _cubic(t), _cubic(1 - t), _cubic(2 - t)], dim=1)
    index = first.long()[:, None] + steps
    if interpolation == "bicubic":
        weight = weight * ((index >= 0) & (index < limit))
    return index.clamp(0, limit - 1), weight.float()


def _cubic(distance: Tensor) -> Tensor:
    """Keys' cubic convolution kernel at a distance in 0..2."""
    a, d = _CUBIC_A, distance
    near = ((a + 2) * d - (a + 3)) * d * d + 1
    far = ((a * d - 5 * a) * d + 8 * a) * d - 4 * a
    return torch.where(d <= 1, near, far)


class Masks(NamedTuple):
    """Predicted masks of a batch.

    masks      B bool tensors in the protocol's frame: [H, W] at network size, or [h0, w0] at each image's own size
    no_target  [B] bool, "the sentence refers to nothing here"; None where neither a head nor a file gives it
    finite     [B] bool, the logits were finite
    boxes      [B, 4] predicted corners x1, y1, x2, y2 in pixels of each original image; None for a model without boxes
    """

    masks: Sequence[Tensor]
    no_target: Tensor | None
    finite: Tensor
    boxes: Tensor | None = None


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
    boxes = None
    if "box" in output.aux:
        shares = output.aux["box"].float()
        boxes = original_boxes(corners_of(shares) * sides(shares, size[1], size[0]), batch.geometry)
    finite = output.logits.isfinite().flatten(1).all(1)
    return Masks(masks, None if head is None else head.argmax(1) == 1, finite, boxes)


def original_boxes(corners: Tensor, geometry: Tensor) -> Tensor:
    """Corners [B, 4] in pixels of the network's input -> of each original image, cut at its borders.

    geometry: [B, 6] as in `records.Batch`. Returns [B, 4] in the dtype of `geometry`.
    """
    size, scale, offset = (geometry[:, i : i + 2].flip(1).repeat(1, 2) for i in (0, 2, 4))  # y, x -> x, y, x, y
    return torch.minimum(((corners - offset) / scale).clamp(min=0), size)


GRID = 64
"""Boxes are compared on a grid of 1/64 pixel, so that areas are whole numbers and a tie is the same everywhere."""


def _detected(predicted: Masks, batch: Batch) -> tuple[Tensor, Tensor]:
    """Intersection and union of predicted and true boxes in 1/4096 of an original pixel, [B] int64; 0 without boxes."""
    if predicted.boxes is None:
        none = torch.zeros_like(batch.sample_id)
        return none, none
    true = boxes_of_masks(batch.target > 127) if batch.box is None else batch.box
    one, other = (
        (boxes.nan_to_num() * GRID).round().long() for boxes in (predicted.boxes, original_boxes(true, batch.geometry))
    )
    return box_overlap_areas(one, other)


def says_nothing(head: Tensor | None, area: Tensor, protocol: Protocol) -> Tensor:
    """[B] bool, the sentence refers to nothing in the image: by the model's head, else by the protocol's pixel count.

    head: [B] bool, what the no-target head says; None without one. area: [B] pixels of the mask, in any frame.
    """
    return area < (protocol.no_target_pixels or 0) if head is None else head


class Found(NamedTuple):
    """What a model found for one sentence, at the image's own size.

    probability  [h0, w0] float32 in 0..1 of the referent
    mask         [h0, w0] bool, the probability exceeds the threshold; all False where `nothing`
    nothing      the sentence refers to nothing here, by `says_nothing`
    head         probability of that by the model's head, 0..1; None without a head
    """

    probability: Tensor
    mask: Tensor
    nothing: bool
    head: float | None


def find_referents(
    output: ModelOutput, size: tuple[int, int], geometry: Sequence[Sequence[float]], protocol: Protocol
) -> list[Found]:
    """Decide what a model found for every sentence of a batch, at each image's own size; waits for the device.

    size: (H, W) of the network input. geometry: B rows of `Batch.geometry` as Python numbers.
    """
    maps = original_probability(output.logits, size, geometry, protocol.interpolation)
    logits = output.aux.get("no_target")
    shares = None if logits is None else logits.float().softmax(1)[:, 1].tolist()
    found = []
    for i, probability in enumerate(maps):
        mask = probability > protocol.threshold
        says = None if logits is None else logits[i : i + 1].argmax(1) == 1
        nothing = bool(says_nothing(says, mask.sum()[None], protocol))
        share = None if shares is None else shares[i]
        found.append(Found(probability.clamp(0, 1), mask & (not nothing), nothing, share))
    return found


def count_pixels(predicted: Masks, batch: Batch, protocol: Protocol) -> Tensor:
    """Return a row of `SAMPLE_COLUMNS` per sample, [B, 11] int64 on the device of the masks."""
    if protocol.frame == "network":
        pairs = zip(predicted.masks, batch.target > 127, strict=True)
    elif len(batch.original_target) == len(predicted.masks):
        pairs = zip(predicted.masks, (truth > 0 for truth in batch.original_target), strict=True)
    else:
        raise UserError('protocol.frame="original" needs a loader that gives the masks at their original size')
    pixels = torch.stack([torch.stack([(m & t).sum(), (m | t).sum(), m.sum(), *_box_pixels(m, t)]) for m, t in pairs])
    area = pixels[:, 2]
    no_target = says_nothing(predicted.no_target, area, protocol)
    counted = (batch.sample_id, pixels[:, 0], pixels[:, 1], batch.no_target, no_target, predicted.finite, area)
    columns = (*counted, pixels[:, 3], pixels[:, 4], *_detected(predicted, batch))
    return torch.stack([c.to(pixels.device, torch.int64) for c in columns], dim=1)


def _box_pixels(predicted: Tensor, truth: Tensor) -> tuple[Tensor, Tensor]:
    """Intersection and union of the boxes around two masks [h, w], int64; an empty mask has an empty box.

    A box is the product of the rows and the columns that its mask reaches, so nothing waits for the device.
    """
    (rows, columns), (true_rows, true_columns) = _spans(predicted), _spans(truth)
    common = _overlap(rows, true_rows) * _overlap(columns, true_columns)
    total = rows[1] * columns[1] + true_rows[1] * true_columns[1] - common
    return common, total


Span = tuple[Tensor, Tensor]
"""First index, and length (0 = nothing)."""


def _spans(mask: Tensor) -> tuple[Span, Span]:
    """Rows and columns of the box around a mask."""
    return _span(mask.any(1)), _span(mask.any(0))


def _span(used: Tensor) -> Span:
    first = used.to(torch.uint8).argmax()
    last = len(used) - 1 - used.flip(0).to(torch.uint8).argmax()
    return first, torch.where(used.any(), last - first + 1, 0)


def _overlap(one: Span, other: Span) -> Tensor:
    end = torch.minimum(one[0] + one[1], other[0] + other[1])
    return (end - torch.maximum(one[0], other[0])).clamp(min=0)
