"""The letterbox warp of CRIS, ETRIS and DETRIS, without OpenCV.

Their code calls OpenCV 4's `warpAffine` with the map index -> scale * index + shift, which has no half-pixel shift. The
warp is separable, so it is two products with sparse matrices, one along y and one along x. OpenCV rounds coordinates to
1/1024 pixel, then to 1/32 pixel; both roundings are repeated here. OpenCV also rounds its cubic weights to 15 bits,
which is not repeated: about one value in a thousand differs, by one grey level. Masks are equal.

Matrices are computed once per image size and cached. An image is warped in strips of output rows that fit the
processor's cache.

Turn a decoded image and its mask into network pixels, and keep the geometry that leads back.

square     stretch to S x S: image bilinear with antialiasing, mask nearest (CARIS, LAVT, ReLA, CGFormer)
square_aliased  the same without antialiasing, mask nearest as OpenCV chooses it (C3VG, DeRIS): images within one grey
           level of OpenCV's, masks equal
letterbox  keep the aspect ratio, centre, pad with the mean colour: image cubic without antialiasing, mask linear
           (CRIS, ETRIS, DETRIS)
longest    keep the aspect ratio, top left, pad below or on the right with the mean colour: image bilinear with
           antialiasing, mask nearest (SAM, GSVA); `inside_longest` tells the two apart on the device

Pixels stay uint8 until they are on the device: `normalise` is the first thing that happens to a batch there.
"""

from functools import lru_cache, reduce
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from accelerate.utils import send_to_device
from numpy.typing import NDArray
from PIL import Image
from scipy.sparse import csr_matrix
from torch import Tensor

from amltrain.data.images import to_rgb
from amltrain.frames import MEAN_STD, VIEW_NORMALIZATION, Normalization, longest_side
from amltrain.records import Batch

Axis = Literal["x", "y"]
Kernel = Literal["cubic", "linear"]

STRIP = 32
"""Output rows that are warped at a time."""
_UNITS = 1024
"""OpenCV computes coordinates in units of 1/1024 pixel ..."""
_GRID = 32
"""... and interpolates on a grid of 1/32 pixel."""


class Resampling(NamedTuple):
    """One axis of the warp: output rows `low` to `high` read the source, all others are border.

    read, weights: [high - low, taps], the source rows that each reads (`count` = the border) and how much of them.
    matrix: the same as [high - low, count + 1] float32; every row adds up to 1. strips: its rows in groups of STRIP.
    """

    low: int
    high: int
    read: NDArray[np.int64]
    weights: NDArray[np.float32]
    matrix: csr_matrix
    strips: tuple["Strip", ...]


class Strip(NamedTuple):
    """Output rows `first` to `last`, counted from `low`, are `matrix` times the source rows `start` to `stop` and the
    border.
    """

    first: int
    last: int
    start: int
    stop: int
    matrix: csr_matrix


class Placement(NamedTuple):
    """Where the scaled image lies on the canvas: network index = scale * image index + shift, in pixels."""

    scale: float
    shift_y: float
    shift_x: float


def placement(height: int, width: int, size: int) -> Placement:
    """Centre an image of height x width pixels on a canvas of size x size pixels, as large as it fits."""
    scale = min(size / height, size / width)
    return Placement(scale, (size - scale * height) / 2, (size - scale * width) / 2)


def warp_image(pixels: NDArray[np.uint8], size: int, border: tuple[int, int, int]) -> torch.Tensor:
    """Letterbox an image: cubic interpolation (a = -0.75) without antialiasing.

    pixels: [h, w, 3] uint8. border: colour outside the image, 0..255. Returns [3, size, size] uint8.
    """
    height, width = pixels.shape[:2]
    scale, shift_y, shift_x = placement(height, width, size)
    along_y = resampling(size, height, scale, shift_y, "y", "cubic")
    along_x = resampling(size, width, scale, shift_x, "x", "cubic")
    canvas = np.empty((3, size, size), np.uint8)
    canvas[:] = np.array(border, np.uint8)[:, None, None]
    inside = canvas[:, along_y.low : along_y.high, along_x.low : along_x.high]
    tallest = max(strip.stop - strip.start for strip in along_y.strips)
    half = np.float32(0.5)  # round half up: add a half to everything, then cut
    edge = np.array(border, np.float32) + half
    buffer = np.empty((tallest + 1, width + 1, 3), np.float32)
    buffer[:, width] = edge
    for strip in along_y.strips:
        count = strip.stop - strip.start
        source = buffer[: count + 1]
        np.add(pixels[strip.start : strip.stop], half, out=source[:count, :width])
        source[count] = edge
        rows = strip.matrix @ source.reshape(count + 1, -1)  # [rows, (w + 1) * 3]
        columns = np.ascontiguousarray(rows.T).reshape(width + 1, -1)  # [w + 1, 3 * rows]
        warped = along_x.matrix @ columns  # [W, 3 * rows]
        np.clip(warped, 0, 255.5, out=warped)
        strip_of = warped.astype(np.uint8).reshape(len(warped), 3, -1)
        inside[:, strip.first : strip.last] = strip_of.transpose(1, 2, 0)
    return torch.from_numpy(canvas)


def warp_mask(mask: NDArray[np.uint8], size: int) -> torch.Tensor:
    """Letterbox a mask: linear interpolation, 0 outside.

    mask: [h, w] uint8, 0 or 1. Returns [size, size] uint8, the share of the pixel that is covered in 1/255.
    """
    height, width = mask.shape
    canvas = np.zeros((size, size), np.uint8)
    used_rows, used_columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if not used_rows.size:
        return torch.from_numpy(canvas)
    top, bottom = int(used_rows[0]), int(used_rows[-1]) + 1
    left, right = int(used_columns[0]), int(used_columns[-1]) + 1
    scale, shift_y, shift_x = placement(height, width, size)
    along_y = _reading(resampling(size, height, scale, shift_y, "y", "linear"), top, bottom)
    along_x = _reading(resampling(size, width, scale, shift_x, "x", "linear"), left, right)
    box = mask[top:bottom, left:right].astype(np.float32) * 255
    rows = reduce(np.add, (box[read] * weight[:, None] for read, weight in along_y.taps))
    covered = reduce(np.add, (rows.take(read, axis=1) * weight for read, weight in along_x.taps))
    canvas[along_y.first : along_y.last, along_x.first : along_x.last] = (covered + np.float32(0.5)).astype(np.uint8)
    return torch.from_numpy(canvas)


class Reading(NamedTuple):
    """Output rows `first` to `last` read a part of the source. taps: (source row in the part, weight), each [rows]."""

    first: int
    last: int
    taps: list[tuple[NDArray[np.int64], NDArray[np.float32]]]


def _reading(along: Resampling, start: int, stop: int) -> Reading:
    """The output rows that read the source rows `start` to `stop`; everything else is 0."""
    inside = (along.read >= start) & (along.read < stop)
    used = np.flatnonzero(inside.any(axis=1))
    first, last = (int(used[0]), int(used[-1]) + 1) if used.size else (0, 0)
    read = np.where(inside, along.read - start, 0)[first:last]
    weights = np.where(inside, along.weights, np.float32(0))[first:last]
    return Reading(along.low + first, along.low + last, list(zip(read.T, weights.T, strict=True)))


@lru_cache(maxsize=512)
def resampling(size: int, count: int, scale: float, shift: float, axis: Axis, kernel: Kernel) -> Resampling:
    """Weights of one axis: which of `count` source pixels each of `size` output pixels reads, and how much of them."""
    positions = _source_positions(size, count, scale, shift, axis)
    first, t = positions >> 5, (positions & (_GRID - 1)) / _GRID
    if kernel == "cubic":
        taps = {-1: _cubic(t + 1), 0: _cubic(t), 1: _cubic(1 - t), 2: _cubic(2 - t)}
    else:
        taps = {0: 1 - t, 1: t}
    read = np.stack([first + step for step in taps], axis=1)  # [size, taps]
    weights = np.stack(list(taps.values()), axis=1).astype(np.float32)
    inside = (read >= 0) & (read < count)
    used = np.flatnonzero((inside & (weights != 0)).any(axis=1))
    low, high = int(used[0]), int(used[-1]) + 1
    read = np.where(inside, read, count)[low:high]
    weights = weights[low:high]
    strips = []
    for begin in range(0, high - low, STRIP):
        end = min(begin + STRIP, high - low)
        rows = read[begin:end]
        start, stop = int(rows.min()), int(rows[rows < count].max()) + 1
        border_last = np.where(rows == count, stop, rows) - start
        strips.append(Strip(begin, end, start, stop, _sparse(border_last, weights[begin:end], stop - start + 1)))
    return Resampling(low, high, read, weights, _sparse(read, weights, count + 1), tuple(strips))


def _sparse(columns: NDArray[np.int64], weights: NDArray[np.float32], width: int) -> csr_matrix:
    """The matrix [rows, width] that has `weights` [rows, taps] at `columns` [rows, taps]; those of one place add up."""
    ends = np.arange(0, columns.size + 1, columns.shape[1])
    return csr_matrix((weights.ravel(), columns.ravel(), ends), shape=(len(columns), width))


def _source_positions(size: int, count: int, scale: float, shift: float, axis: Axis) -> NDArray[np.int64]:
    """Source position of every output pixel in 1/32 pixel, [size] int64.

    OpenCV gets three pairs of points as float32. Along x it rounds step and start apart, along y their sum.
    """
    start, end = float(np.float32(shift)), float(np.float32(shift + count * scale))
    step = count / (end - start)
    index = np.arange(size)
    if axis == "x":
        units = np.rint(index * step * _UNITS) + np.rint(-start * step * _UNITS)
    else:
        units = np.rint((index * step - start * step) * _UNITS)
    per_grid = _UNITS // _GRID
    return (units.astype(np.int64) + per_grid // 2) // per_grid


def _cubic(distance: NDArray[np.float64]) -> NDArray[np.float64]:
    """Keys' cubic kernel with OpenCV's a = -0.75, at distances in 0..2."""
    a, d = -0.75, distance
    near = ((a + 2) * d - (a + 3)) * d * d + 1
    far = ((a * d - 5 * a) * d + 8 * a) * d - 4 * a
    return np.where(d <= 1, near, far)


Resize = Literal["square", "square_aliased", "letterbox", "longest"]


class Transformed(NamedTuple):
    """image [3, S, S] uint8 RGB; target [S, S] uint8 coverage 0..255 or None; geometry [6] float64 as in
    `records.Batch`.
    """

    image: Tensor
    target: Tensor | None
    geometry: Tensor


class ImageTransform:
    """Deterministic preprocessing of one protocol."""

    def __init__(self, size: int, resize: Resize = "square", normalization: Normalization = "imagenet") -> None:
        """size: side S of the network input, pixels."""
        self.size, self.resize, self.normalization = size, resize, normalization
        red, green, blue = (round(255 * channel) for channel in MEAN_STD[normalization][0])
        self.border = (red, green, blue)

    def __call__(self, image: Image.Image | Tensor, mask: NDArray[np.uint8] | None = None) -> Transformed:
        """Transform an image and its mask.

        image: a PIL image of any mode, or a [3, h, w] uint8 RGB tensor. mask: [h, w] uint8, 0 or 1.
        """
        height, width = image.shape[-2:] if isinstance(image, Tensor) else image.size[::-1]
        target = None if mask is None else self.target(mask)
        return Transformed(self.pixels(image), target, self.geometry(height, width))

    def pixels(self, image: Image.Image | Tensor) -> Tensor:
        """Resize an image to [3, S, S] uint8. A tensor is resized by torch, a PIL image by Pillow."""
        if self.resize == "square_aliased":
            return stretched(image, (self.size, self.size), "bilinear")
        if isinstance(image, Tensor):
            if self.resize == "square":
                side = (self.size, self.size)
                return F.interpolate(image[None], side, mode="bilinear", antialias=True)[0]
            if self.resize == "longest":
                side = longest_side(image.shape[-2], image.shape[-1], self.size)
                return self._canvas(F.interpolate(image[None], side, mode="bilinear", antialias=True)[0])
            return warp_image(image.permute(1, 2, 0).numpy(), self.size, self.border)
        image = image if image.mode == "RGB" else to_rgb(image)
        if self.resize == "square":
            resized = image.resize((self.size, self.size), Image.Resampling.BILINEAR)
            return torch.from_numpy(np.array(resized)).permute(2, 0, 1)
        if self.resize == "longest":
            height, width = longest_side(image.height, image.width, self.size)
            resized = image.resize((width, height), Image.Resampling.BILINEAR)
            return self._canvas(torch.from_numpy(np.array(resized)).permute(2, 0, 1))
        return warp_image(np.asarray(image), self.size, self.border)

    def _canvas(self, image: Tensor) -> Tensor:
        """The image [3, h, w] uint8 in the upper left corner, the mean colour elsewhere, [3, S, S]."""
        canvas = torch.tensor(self.border, dtype=torch.uint8)[:, None, None].repeat(1, self.size, self.size)
        canvas[:, : image.shape[1], : image.shape[2]] = image
        return canvas

    def target(self, mask: NDArray[np.uint8]) -> Tensor:
        """Resize a mask [h, w] of 0 and 1 to [S, S] uint8, the share of each pixel that is covered in 1/255."""
        if self.resize == "letterbox":
            return warp_mask(mask, self.size)
        height, width = mask.shape
        sides = longest_side(height, width, self.size) if self.resize == "longest" else (self.size, self.size)
        nearest = _first_of if self.resize == "square_aliased" else _nearest
        rows, columns = (nearest(count, side) for count, side in zip(mask.shape, sides, strict=True))
        chosen = np.ascontiguousarray(mask.T[columns].T)[rows]  # masks are stored by columns
        resized = torch.from_numpy(chosen * np.uint8(255))
        return F.pad(resized, (0, self.size - sides[1], 0, self.size - sides[0]))

    def geometry(self, height: int, width: int) -> Tensor:
        """Geometry of an image of height x width pixels, [6] float64 as in `records.Batch`."""
        if self.resize in ("square", "square_aliased"):
            values = (height, width, self.size / height, self.size / width, 0.0, 0.0)
        elif self.resize == "longest":
            rows, columns = longest_side(height, width, self.size)
            values = (height, width, rows / height, columns / width, 0.0, 0.0)
        else:
            scale, shift_y, shift_x = placement(height, width, self.size)
            half = 0.5 * (1 - scale)  # from pixel indices to continuous coordinates
            values = (height, width, scale, scale, shift_y + half, shift_x + half)
        return torch.tensor(values, dtype=torch.float64)

    def denormalise(self, image: Tensor) -> NDArray[np.uint8]:
        """Turn an image [3, S, S], normalised or uint8, into [S, S, 3] uint8 RGB for pictures."""
        if image.is_floating_point():
            mean, std = _mean_std(self.normalization, torch.device("cpu"))
            image = (image.float().cpu() * std + mean).round().clamp(0, 255).to(torch.uint8)
        return image.permute(1, 2, 0).cpu().numpy()


def stretched(image: Image.Image | Tensor, sides: tuple[int, int], mode: Literal["bilinear", "bicubic"]) -> Tensor:
    """Stretch an image, PIL or [3, h, w] uint8, to [3, *sides] uint8 without antialiasing, as OpenCV does.

    Pixels are interpolated as floating point and rounded: one grey level from OpenCV, and the same on every machine.
    """
    if not isinstance(image, Tensor):
        image = torch.from_numpy(np.array(image if image.mode == "RGB" else to_rgb(image))).permute(2, 0, 1)
    resized = F.interpolate(image[None].float(), sides, mode=mode, align_corners=False)[0]
    return resized.round_().clamp_(0, 255).to(torch.uint8)


class View:
    """A picture as a second encoder reads it.

    centre     shortest side to `size` pixels, bicubic, cut to a square in the middle; what lies outside is not seen.
               CLIP's own preprocessing
    bilinear, bicubic  all of it, stretched to a square without antialiasing
    """

    def __init__(self, size: int, kind: Literal["centre", "bilinear", "bicubic"] = "centre") -> None:
        self.size, self.kind = size, kind

    def __call__(self, image: Image.Image) -> tuple[Tensor, Tensor]:
        """The picture, [3, size, size] uint8, and its geometry, [6] float64 as in `records.Batch`."""
        if self.kind != "centre":
            height, width = image.height, image.width
            values = (height, width, self.size / height, self.size / width, 0.0, 0.0)
            return stretched(image, (self.size, self.size), self.kind), torch.tensor(values, dtype=torch.float64)
        image = image if image.mode == "RGB" else to_rgb(image)
        short = min(image.size)
        width, height = (self.size if side == short else int(self.size * side / short) for side in image.size)
        resized = image.resize((width, height), Image.Resampling.BICUBIC)
        left, top = (width - self.size) // 2, (height - self.size) // 2
        cut = resized.crop((left, top, left + self.size, top + self.size))
        values = (image.height, image.width, height / image.height, width / image.width, -top, -left)
        return torch.from_numpy(np.array(cut)).permute(2, 0, 1), torch.tensor(values, dtype=torch.float64)


@lru_cache(maxsize=1024)
def _first_of(count: int, size: int) -> NDArray[np.int64]:
    """Which of `count` pixels each of `size` pixels takes, [size]: the one under its upper left corner, as OpenCV."""
    return np.arange(size, dtype=np.int64) * count // size


@lru_cache(maxsize=1024)
def _nearest(count: int, size: int) -> NDArray[np.int32]:
    """Which of `count` pixels each of `size` pixels takes, [size], as Pillow's nearest neighbour chooses them."""
    ramp = Image.fromarray(np.arange(count, dtype=np.int32)[None])
    return np.asarray(ramp.resize((size, 1), Image.Resampling.NEAREST))[0]


def normalise(pixels: Tensor, normalization: Normalization) -> Tensor:
    """Turn uint8 pixels [..., 3, H, W] into float32 network input: (pixels - 255 mean) / (255 std) per channel.

    Pixels that are floating point already are returned as they are.
    """
    if pixels.is_floating_point():
        return pixels
    mean, std = _mean_std(normalization, pixels.device)
    return pixels.to(torch.float32, memory_format=torch.contiguous_format).sub_(mean).div_(std)


def prepare_batch(batch: Batch, normalization: Normalization, device: torch.device | None = None) -> Batch:
    """Move a batch as a loader gives it to a device, and normalise its images there: [B, 3, H, W] uint8 to float32.

    Models, losses and methods expect a batch that went through this. device: None = where the batch is.
    """
    if device is not None:
        batch = send_to_device(batch, device, non_blocking=True)
    view = None if batch.view is None else normalise(batch.view, VIEW_NORMALIZATION)
    return batch._replace(image=normalise(batch.image, normalization), view=view)


@lru_cache(maxsize=16)
def _mean_std(normalization: Normalization, device: torch.device) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of 0..255 pixels, [3, 1, 1] float32; cached, so that no step waits for a copy."""
    mean, std = (np.array(values, np.float32) * 255 for values in MEAN_STD[normalization])
    with torch.inference_mode(False):
        return torch.from_numpy(mean[:, None, None]).to(device), torch.from_numpy(std[:, None, None]).to(device)
