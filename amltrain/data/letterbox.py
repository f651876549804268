"""The letterbox warp of CRIS, ETRIS and DETRIS, without OpenCV.

Their code calls OpenCV 4's `warpAffine` with the map index -> scale * index + shift, which has no half-pixel shift. The
warp is separable, so it is computed as two products with banded matrices. OpenCV rounds coordinates to 1/1024 pixel,
then to 1/32 pixel; both roundings are repeated here. OpenCV also rounds its cubic weights to 15 bits, which is not
repeated: about one value in a thousand differs, by one grey level. Masks are equal.

Matrices are computed once per image size and cached.
"""

from functools import lru_cache
from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

Axis = Literal["x", "y"]
Kernel = Literal["cubic", "linear"]

ROWS = 8
"""Output rows per matrix product: small, because a dense block of a banded matrix is mostly zeros."""
_UNITS = 1024
"""OpenCV computes coordinates in units of 1/1024 pixel ..."""
_GRID = 32
"""... and interpolates on a grid of 1/32 pixel."""


class Band(NamedTuple):
    """Output rows `first` to `last` are `weights` [last - first, stop - start] times source rows `start` to `stop`."""

    first: int
    last: int
    start: int
    stop: int
    weights: NDArray[np.float32]


class Resampling(NamedTuple):
    """One axis of the warp: output rows `low` to `high` read the source; rows outside are border. Band rows count from
    `low`."""

    low: int
    high: int
    bands: tuple[Band, ...]


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
    offset = np.array(border, np.float32)  # pixels are warped as differences from the border, which is then 0
    rows = _multiply(along_y, np.ascontiguousarray(pixels).reshape(height, -1), np.tile(offset, width))  # [H, w * 3]
    columns = torch.from_numpy(rows).t().contiguous().numpy().reshape(width, -1)  # [w, 3 * H]
    warped = _multiply(along_x, columns).reshape(along_x.high - along_x.low, 3, -1)  # [W, 3, H]
    warped += offset[:, None] + np.float32(0.5)  # round half up: add a half, then cut
    np.clip(warped, 0, 255.5, out=warped)
    canvas = torch.tensor(border, dtype=torch.uint8)[:, None, None].repeat(1, size, size)
    canvas[:, along_y.low : along_y.high, along_x.low : along_x.high] = (
        torch.from_numpy(warped).to(torch.uint8).permute(1, 2, 0)
    )
    return canvas


def warp_mask(mask: NDArray[np.uint8], size: int) -> torch.Tensor:
    """Letterbox a mask: linear interpolation, 0 outside.

    mask: [h, w] uint8, 0 or 1. Returns [size, size] uint8, the share of the pixel that is covered in 1/255.
    """
    height, width = mask.shape
    canvas = torch.zeros(size, size, dtype=torch.uint8)
    used_rows, used_columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if not used_rows.size:
        return canvas
    scale, shift_y, shift_x = placement(height, width, size)
    along_y = resampling(size, height, scale, shift_y, "y", "linear")
    along_x = resampling(size, width, scale, shift_x, "x", "linear")
    top, left = int(used_rows[0]), int(used_columns[0])
    box = mask[top : used_rows[-1] + 1, left : used_columns[-1] + 1].astype(np.float32) * 255
    rows = _multiply(along_y, np.ascontiguousarray(box), first_row=top)  # [H, columns of the box]
    covered = _multiply(along_x, np.ascontiguousarray(rows.T), first_row=left)  # [W, H]
    canvas[along_y.low : along_y.high, along_x.low : along_x.high] = torch.from_numpy(
        (covered + np.float32(0.5)).astype(np.uint8).T
    )
    return canvas


@lru_cache(maxsize=512)
def resampling(size: int, count: int, scale: float, shift: float, axis: Axis, kernel: Kernel) -> Resampling:
    """Weights of one axis: which of `count` source pixels each of `size` output pixels reads, and how much of them."""
    positions = _source_positions(size, count, scale, shift, axis)
    first, t = positions >> 5, (positions & (_GRID - 1)) / _GRID
    if kernel == "cubic":
        taps = {-1: _cubic(t + 1), 0: _cubic(t), 1: _cubic(1 - t), 2: _cubic(2 - t)}
    else:
        taps = {0: 1 - t, 1: t}
    matrix = np.zeros((size, count), np.float32)
    rows = np.arange(size)
    for step, weight in taps.items():
        inside = (first + step >= 0) & (first + step < count)
        matrix[rows[inside], (first + step)[inside]] += weight[inside]
    used = np.flatnonzero(matrix.any(axis=1))
    low, high = int(used[0]), int(used[-1]) + 1
    bands = []
    for start in range(low, high, ROWS):
        block = matrix[start : min(start + ROWS, high)]
        read = np.flatnonzero(block.any(axis=0))
        columns = slice(int(read[0]), int(read[-1]) + 1)
        bands.append(Band(start - low, start - low + len(block), columns.start, columns.stop, block[:, columns].copy()))
    return Resampling(low, high, tuple(bands))


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


def _multiply(
    along: Resampling, source: NDArray, offset: NDArray[np.float32] | None = None, first_row: int = 0
) -> NDArray[np.float32]:
    """The banded matrix times (source - offset), [high - low, columns] float32.

    source: [rows, columns], the rows from `first_row` on; rows that are not given count as 0.
    """
    columns = source.shape[1]
    result = np.empty((along.high - along.low, columns), np.float32)
    last_row = first_row + len(source)
    for band in along.bands:
        start, stop = max(band.start, first_row), min(band.stop, last_row)
        if start >= stop:
            result[band.first : band.last] = 0
            continue
        rows = source[start - first_row : stop - first_row]
        weights = band.weights[:, start - band.start : stop - band.start]
        np.matmul(weights, rows if offset is None else rows - offset, out=result[band.first : band.last])
    return result


def _cubic(distance: NDArray[np.float64]) -> NDArray[np.float64]:
    """Keys' cubic kernel with OpenCV's a = -0.75, at distances in 0..2."""
    a, d = -0.75, distance
    near = ((a + 2) * d - (a + 3)) * d * d + 1
    far = ((a * d - 5 * a) * d + 8 * a) * d - 4 * a
    return np.where(d <= 1, near, far)
