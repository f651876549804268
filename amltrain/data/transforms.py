"""Turn a decoded image and its mask into network pixels, and keep the geometry that leads back.

square     stretch to S x S: image bilinear with antialiasing, mask nearest (CARIS, LAVT, ReLA, CGFormer)
letterbox  keep the aspect ratio, centre, pad with the mean colour: image cubic without antialiasing, mask linear
           (CRIS, ETRIS, DETRIS); see `letterbox.py`

Pixels stay uint8 until they are on the device: `normalise` is the first thing that happens to a batch there.
"""

from functools import lru_cache
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from amltrain.data.images import to_rgb
from amltrain.data.letterbox import placement, warp_image, warp_mask
from amltrain.records import Batch

Resize = Literal["square", "letterbox"]
Normalization = Literal["imagenet", "clip", "half"]

MEAN_STD: dict[str, tuple[tuple[float, float, float], tuple[float, float, float]]] = {
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "clip": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
    "half": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
}


class Transformed(NamedTuple):
    """image [3, S, S] uint8 RGB; target [S, S] uint8 coverage 0..255 or None; geometry [6] float64 as in
    `records.Batch`."""

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
        if isinstance(image, Tensor):
            if self.resize == "square":
                side = (self.size, self.size)
                return F.interpolate(image[None], side, mode="bilinear", antialias=True)[0]
            return warp_image(image.permute(1, 2, 0).numpy(), self.size, self.border)
        image = image if image.mode == "RGB" else to_rgb(image)
        if self.resize == "square":
            resized = image.resize((self.size, self.size), Image.Resampling.BILINEAR)
            return torch.from_numpy(np.array(resized)).permute(2, 0, 1)
        return warp_image(np.asarray(image), self.size, self.border)

    def target(self, mask: NDArray[np.uint8]) -> Tensor:
        """Resize a mask [h, w] of 0 and 1 to [S, S] uint8, the share of each pixel that is covered in 1/255."""
        if self.resize == "letterbox":
            return warp_mask(mask, self.size)
        rows, columns = (_nearest(count, self.size) for count in mask.shape)
        chosen = np.ascontiguousarray(mask.T[columns].T)[rows]  # masks are stored by columns
        return torch.from_numpy(chosen * np.uint8(255))

    def geometry(self, height: int, width: int) -> Tensor:
        """Geometry of an image of height x width pixels, [6] float64 as in `records.Batch`."""
        if self.resize == "square":
            values = (height, width, self.size / height, self.size / width, 0.0, 0.0)
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


def normalise_batch(batch: Batch, normalization: Normalization) -> Batch:
    """Normalise the images of a batch, on the device that the batch is on; the first thing to do with a batch there.

    Models, losses and methods expect a batch that went through this.
    """
    return batch._replace(image=normalise(batch.image, normalization))


@lru_cache(maxsize=16)
def _mean_std(normalization: Normalization, device: torch.device) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of 0..255 pixels, [3, 1, 1] float32; cached, so that no step waits for a copy."""
    mean, std = (np.array(values, np.float32) * 255 for values in MEAN_STD[normalization])
    with torch.inference_mode(False):
        return torch.from_numpy(mean[:, None, None]).to(device), torch.from_numpy(std[:, None, None]).to(device)
