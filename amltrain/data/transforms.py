"""A decoded image and its mask -> what the network reads, and the geometry that leads back.

square     stretch to S x S: image bilinear with PIL's antialiasing, mask nearest (CARIS, LAVT, ReLA, CGFormer)
letterbox  keep the aspect ratio, centre, pad with the mean colour: image cubic without antialiasing, mask linear
           (CRIS, ETRIS, DETRIS). The releases use OpenCV 4's `warpAffine` with the map index -> s * index + b, which
           has no half-pixel shift; its coordinates on a grid of 1/32 pixel are repeated here without OpenCV.
"""

from typing import Literal, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from amltrain.data.images import to_rgb

Resize = Literal["square", "letterbox"]
Normalization = Literal["imagenet", "clip", "half"]

MEAN_STD: dict[str, tuple[tuple[float, float, float], tuple[float, float, float]]] = {
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "clip": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
    "half": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
}


class Transformed(NamedTuple):
    """image [3, S, S] float32 normalised; target [S, S] uint8 coverage 0..255 or None; geometry [6] float64 as in
    `records.Batch`."""

    image: Tensor
    target: Tensor | None
    geometry: Tensor


class ImageTransform:
    """Deterministic preprocessing of one protocol."""

    def __init__(self, size: int, resize: Resize = "square", normalization: Normalization = "imagenet") -> None:
        """size: side S of the network input, pixels."""
        self.size, self.resize, self.normalization = size, resize, normalization
        mean, std = MEAN_STD[normalization]
        self.mean = np.array(mean, np.float32) * 255
        self.std = np.array(std, np.float32) * 255

    def __call__(self, image: Image.Image, mask: np.ndarray | None = None) -> Transformed:
        """image: any mode, (width, height) w x h; mask: [h, w] uint8, 0 or 1."""
        image = image if image.mode == "RGB" else to_rgb(image)
        if self.resize == "square":
            pixels, target, geometry = self._square(image, mask)
        else:
            pixels, target, geometry = self._letterbox(np.asarray(image), mask)
        channels = np.ascontiguousarray(pixels.transpose(2, 0, 1), dtype=np.float32)
        channels -= self.mean[:, None, None]
        channels /= self.std[:, None, None]
        return Transformed(
            torch.from_numpy(channels),
            None if target is None else torch.from_numpy(target),
            torch.tensor(geometry, dtype=torch.float64),
        )

    def denormalise(self, image: Tensor) -> np.ndarray:
        """[3, S, S] as the network reads it -> [S, S, 3] uint8 RGB, for pictures."""
        pixels = image.float().cpu().numpy().transpose(1, 2, 0) * self.std + self.mean
        return pixels.round().clip(0, 255).astype(np.uint8)

    def _square(
        self, image: Image.Image, mask: np.ndarray | None
    ) -> tuple[np.ndarray, np.ndarray | None, tuple[float, ...]]:
        side = (self.size, self.size)
        width, height = image.size
        pixels = np.asarray(image.resize(side, Image.Resampling.BILINEAR))
        target = None
        if mask is not None:
            target = np.array(Image.fromarray(mask * np.uint8(255)).resize(side, Image.Resampling.NEAREST))
        return pixels, target, (height, width, self.size / height, self.size / width, 0.0, 0.0)

    def _letterbox(
        self, pixels: np.ndarray, mask: np.ndarray | None
    ) -> tuple[np.ndarray, np.ndarray | None, tuple[float, ...]]:
        height, width = pixels.shape[:2]
        scale = min(self.size / height, self.size / width)
        shift_y, shift_x = (self.size - scale * height) / 2, (self.size - scale * width) / 2
        border = self.mean.round()
        cubic_y, cubic_x = (
            _resampling(self.size, count, scale, shift, cubic=True)
            for count, shift in ((height, shift_y), (width, shift_x))
        )
        rows = _resample(cubic_y, pixels - border)  # [S, w, 3]
        warped = _resample(cubic_x, np.ascontiguousarray(rows.transpose(1, 0, 2))).transpose(1, 0, 2) + border
        target = None
        if mask is not None:
            linear_y, linear_x = (
                _resampling(self.size, count, scale, shift, cubic=False)
                for count, shift in ((height, shift_y), (width, shift_x))
            )
            covered = _resample(linear_y, mask.astype(np.float32) * 255)  # [S, w]
            covered = _resample(linear_x, np.ascontiguousarray(covered.T)).T
            target = covered.round().astype(np.uint8)
        half = 0.5 * (1 - scale)  # from pixel indices to continuous coordinates
        geometry = (height, width, scale, scale, shift_y + half, shift_x + half)
        return warped.round().clip(0, 255), target, geometry


def _resampling(size: int, count: int, scale: float, shift: float, *, cubic: bool) -> np.ndarray:
    """[size, count] float32: row i holds the weights of the source pixels that output pixel i reads; 0 outside."""
    position = np.floor((np.arange(size) - shift) / scale * 32 + 0.5) / 32
    first = np.floor(position).astype(np.int64)
    t = position - first
    if cubic:
        weights = {-1: _cubic(t + 1), 0: _cubic(t), 1: _cubic(1 - t), 2: _cubic(2 - t)}
    else:
        weights = {0: 1 - t, 1: t}
    matrix = np.zeros((size, count), np.float32)
    rows = np.arange(size)
    for step, weight in weights.items():
        inside = (first + step >= 0) & (first + step < count)
        matrix[rows[inside], (first + step)[inside]] += weight[inside]
    return matrix


def _resample(matrix: np.ndarray, source: np.ndarray) -> np.ndarray:
    """matrix [S, N] times source [N, ...]; a block of rows reads only the few source rows where it is not zero."""
    result = np.zeros((len(matrix), *source.shape[1:]), np.float32)
    flat, out = source.reshape(len(source), -1), result.reshape(len(matrix), -1)
    for start in range(0, len(matrix), 32):
        block = matrix[start : start + 32]
        used = np.flatnonzero(block.any(axis=0))
        if used.size:
            read = slice(used[0], used[-1] + 1)
            out[start : start + 32] = block[:, read] @ flat[read]
    return result


def _cubic(distance: np.ndarray) -> np.ndarray:
    """Keys' cubic kernel with OpenCV's a = -0.75, at distances in 0..2."""
    a, d = -0.75, distance
    near = ((a + 2) * d - (a + 3)) * d * d + 1
    far = ((a * d - 5 * a) * d + 8 * a) * d - 4 * a
    return np.where(d <= 1, near, far)
