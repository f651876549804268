"""Pictures of one prediction as layers: the photograph as a JPEG, everything else as a transparent PNG over it."""

import base64
import io
from typing import NamedTuple

import matplotlib
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from amltrain.evaluation.visualize import PAPER, PREDICTION, TRUTH, Colour, shrink

RIGHT: Colour = (0, 158, 96)
MISSED: Colour = (0, 114, 178)
WRONG: Colour = (213, 48, 48)


class Layers(NamedTuple):
    """Data URIs of one sample, all of one size except `scores` and `masked`; None where the method gives none."""

    image: str
    truth: str
    prediction: str
    error: str
    scores: str | None
    masked: str | None


def draw_layers(
    image: Image.Image,
    truth: NDArray[np.bool_],
    prediction: NDArray[np.bool_],
    scores: NDArray[np.float32] | None = None,
    masked: NDArray[np.bool_] | None = None,
    side: int = 320,
) -> Layers:
    """Draw the layers of one sample.

    image: RGB; truth, prediction: [h, w] bool at its size; scores: [a, b] float 0..1, masked: [c, d] bool, both over
    the whole image; side: longest side in pixels, larger images are scaled down.
    """
    scale = min(1.0, side / max(image.size))
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    small = image.convert("RGB").resize(size, Image.Resampling.LANCZOS)
    truth, prediction = _resized(truth, size), _resized(prediction, size)
    error = np.zeros((size[1], size[0], 4), np.uint8)
    for mask, colour in ((truth & prediction, RIGHT), (truth & ~prediction, MISSED), (prediction & ~truth, WRONG)):
        error[mask] = (*colour, 190)
    return Layers(
        _uri(small, "JPEG", quality=88),
        _png(_outlined(truth, TRUTH, fill=0)),
        _png(_outlined(prediction, PREDICTION, fill=90)),
        _png(error),
        None if scores is None else _png(_heat(scores, size)),
        None if masked is None else _png(_blocked(masked, size)),
    )


def _resized(mask: NDArray[np.bool_], size: tuple[int, int]) -> NDArray[np.bool_]:
    picture = Image.fromarray(mask.astype(np.uint8) * 255)
    return np.asarray(picture.resize(size, Image.Resampling.BILINEAR)) > 127


def _outlined(mask: NDArray[np.bool_], colour: Colour, fill: int) -> NDArray[np.uint8]:
    """RGBA: an outline with a white rim on a fill of this opacity, 0..255; 0 keeps the colours that sentences name."""
    layer = np.zeros((*mask.shape, 4), np.uint8)
    layer[mask] = (*colour, fill)
    width = max(1, round(max(mask.shape) / 130))
    within = shrink(mask, width)
    layer[within & ~shrink(within, max(1, width // 2))] = (*PAPER, 255)
    layer[mask & ~within] = (*colour, 255)
    return layer


def _heat(scores: NDArray[np.float32], size: tuple[int, int]) -> NDArray[np.uint8]:
    """RGBA of scores on one scale, 0 to 1, for all samples."""
    colours = matplotlib.colormaps["viridis"](np.clip(scores, 0, 1), alpha=0.8, bytes=True)
    return np.asarray(Image.fromarray(colours).resize(size, Image.Resampling.NEAREST))


def _blocked(masked: NDArray[np.bool_], size: tuple[int, int]) -> NDArray[np.uint8]:
    """RGBA: masked blocks black, the rest clear."""
    layer = np.zeros((*masked.shape, 4), np.uint8)
    layer[masked] = (0, 0, 0, 255)
    return np.asarray(Image.fromarray(layer).resize(size, Image.Resampling.NEAREST))


def _png(rgba: NDArray[np.uint8]) -> str:
    return _uri(Image.fromarray(rgba).quantize(64), "PNG", optimize=True)


def _uri(picture: Image.Image, kind: str, **options: object) -> str:
    out = io.BytesIO()
    picture.save(out, kind, **options)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(out.getvalue()).decode('ascii')}"
