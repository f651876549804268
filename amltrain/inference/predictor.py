"""Segment what sentences refer to in an image; masks come back at the image's own size.

from amltrain import Predictor
predictor = Predictor("runs/quickstart/best")
[found] = predictor("street.jpg", "the red car on the left")
for path, [found] in predictor.each("photos/", "the dog"): ...
"""

import glob
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal, NamedTuple, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor

from amltrain.data.images import to_rgb
from amltrain.data.loaders import build_transform, build_view, build_writer, collate
from amltrain.data.transforms import prepare_batch
from amltrain.environment import choose_device
from amltrain.errors import UserError, first_line
from amltrain.evaluation.masks import Found, find_referents, network_size
from amltrain.hub.model_folder import Pretrained, load_pretrained
from amltrain.records import Batch, ModelOutput, Sample

ImageSource: TypeAlias = "str | Path | Image.Image | NDArray[np.generic]"
Precision = Literal["no", "fp16", "bf16"]
INSIDE = "mean probability inside the mask"
NO_TARGET = "probability that the sentence refers to nothing in the image"
NO_PIXEL = "1 - highest probability of any pixel"


class Segmentation(NamedTuple):
    """What a sentence refers to in an image of h x w pixels.

    mask           [h, w] bool; all False where the sentence refers to nothing
    probability    [h, w] float32, 0..1: how likely each pixel belongs to the object
    confidence     0..1; `confidence_of` names what it measures
    nothing        the sentence refers to nothing in this image: decided by the model's no-target head, by the
                   protocol's pixel count, or because no pixel passes the threshold
    confidence_of  one of `INSIDE` (a mask was found), `NO_TARGET` (the model has a no-target head and it decided), and
                   `NO_PIXEL` (the mask is empty or too small)
    threshold      probability that a pixel of the mask exceeds
    """

    mask: NDArray[np.bool_]
    probability: NDArray[np.float32]
    confidence: float
    nothing: bool
    confidence_of: str = INSIDE
    threshold: float = 0.5


class Predictor:
    """A loaded model with its own preprocessing and threshold; runs without gradient, on any device."""

    def __init__(
        self,
        source: Pretrained | str | Path,
        device: str | torch.device | None = None,
        batch_size: int = 8,
        precision: Precision = "no",
        threshold: float | None = None,
    ) -> None:
        """source: a model that was loaded, or a run's checkpoint, a model folder or a Hub repository.

        device: None = a GPU if there is one, as everywhere. batch_size: sentences per forward pass. precision: fp16 or
        bf16 autocast, "no" is fp32. threshold: probability that a pixel of the mask exceeds, 0..1; None = the model's.
        Raises UserError.
        """
        if not isinstance(source, (Pretrained, str, Path)):
            raise UserError(
                f"a predictor of a {type(source).__name__}; give one checkpoint, e.g. 'runs/photos/best', and "
                f"several images to Predictor.each"
            )
        pretrained = source if isinstance(source, Pretrained) else load_pretrained(source)
        if threshold is not None and not 0 <= threshold <= 1:
            raise UserError(f"threshold is {threshold} and must lie from 0 to 1")
        if device is None or isinstance(device, str):
            device = choose_device(device)
        if pretrained.tokenizer is None:
            raise UserError(f"{pretrained.folder} has no tokenizer files; save or convert it again with a tokenizer")
        self.model = pretrained.model.eval().to(device)
        self.name, self.preprocess = pretrained.name, pretrained.preprocess
        self.protocol = pretrained.protocol if threshold is None else replace(pretrained.protocol, threshold=threshold)
        self.tokenizer = pretrained.tokenizer
        self.transform = build_transform(pretrained.preprocess)
        self.view = build_view(pretrained.preprocess)
        self.writer = build_writer(pretrained.preprocess, self.tokenizer, "written")
        self.device, self.batch_size, self.precision = torch.device(device), batch_size, precision

    def __repr__(self) -> str:
        """Name the model, its input and where it runs, e.g. `Predictor(caris_tiny, 96 px square, cpu, fp32)`."""
        precision = "fp32" if self.precision == "no" else self.precision
        preprocess = f"{self.preprocess.size} px {self.preprocess.resize}"
        return f"{type(self).__name__}({self.name}, {preprocess}, {self.device}, {precision})"

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        device: str | torch.device | None = None,
        *,
        revision: str | None = None,
        batch_size: int = 8,
        precision: Precision = "no",
        threshold: float | None = None,
    ) -> "Predictor":
        """Load a model folder, a checkpoint folder or a Hub repository, maybe of a revision; see `load_pretrained`."""
        return cls(load_pretrained(source, revision=revision), device, batch_size, precision, threshold)

    def __call__(self, image: ImageSource, sentences: str | Sequence[str]) -> list[Segmentation]:
        """Segment what each sentence refers to.

        image: a path, a PIL image of any mode that `to_rgb` takes, or an array ([h, w] or [h, w, 3] uint8, [h, w]
        uint16). An EXIF rotation is applied first, so that masks fit the image as viewers show it. Raises UserError for
        an empty sentence, or an image that cannot be read.
        """
        sentences = (
            [sentences] if isinstance(sentences, str) or not isinstance(sentences, Iterable) else list(sentences)
        )
        for sentence in sentences:
            if not isinstance(sentence, str):
                raise UserError(f"a sentence is of type {type(sentence).__name__}; give a text, or a list of texts")
        if not all(s.strip() for s in sentences):
            raise UserError("a sentence is empty; say what to look for")
        picture = load_image(image)
        pixels, _, geometry = self.transform(picture, None)
        view = None if self.view is None else self.view(picture)
        found: list[Segmentation] = []
        for start in range(0, len(sentences), self.batch_size):
            batch = self.batch(pixels, geometry, sentences[start : start + self.batch_size], view)
            found += self._segmentations(self.forward(batch), batch)
        return found

    def each(
        self, images: str | Path | Sequence[str | Path], sentences: str | Sequence[str]
    ) -> Iterator[tuple[str, list[Segmentation]]]:
        """Yield (path, what each sentence refers to) of files, folders and patterns, one image at a time.

        Raises UserError for a source that names no image, before the first one is read, and at one that is unreadable.
        """
        sources = [images] if isinstance(images, (str, Path)) else images
        for path in find_images([str(source) for source in sources]):
            yield path, self(path, sentences)

    @torch.no_grad()
    def forward(self, batch: Batch) -> ModelOutput:
        """Run the model on a batch in the predictor's precision."""
        kind = torch.float16 if self.precision == "fp16" else torch.bfloat16
        with torch.autocast(self.device.type, kind, enabled=self.precision != "no"):
            return self.model(batch)

    def batch(
        self, pixels: Tensor, geometry: Tensor, sentences: Sequence[str], view: tuple[Tensor, Tensor] | None = None
    ) -> Batch:
        """Pair one transformed image with sentences.

        pixels: [3, S, S] uint8, or float32 normalised; geometry: [6] float64; view: [3, v, v] uint8 and its geometry,
        for a model that reads a second picture.
        """
        blank = torch.zeros(pixels.shape[-2:], dtype=torch.uint8)
        nothing, number = torch.tensor(False), torch.tensor(0)
        second, frame = (None, None) if view is None else view
        samples = [
            Sample(
                pixels, *self.tokenizer(sentence), blank, nothing, torch.tensor(i), number, geometry,
                view=second, sentence=sentence, picture=0, view_geometry=frame,
            )
            for i, sentence in enumerate(sentences)
        ]  # fmt: skip
        return prepare_batch(collate(samples, self.writer), self.transform.normalization, self.device)

    def _segmentations(self, output: ModelOutput, batch: Batch) -> list[Segmentation]:
        found = find_referents(output, network_size(batch), batch.geometry.tolist(), self.protocol)
        return [_segmentation(one)._replace(threshold=self.protocol.threshold) for one in found]


def _segmentation(found: Found) -> Segmentation:
    values, mask = found.probability.cpu().numpy(), found.mask.cpu().numpy()
    if found.nothing and found.head is not None:
        return Segmentation(mask, values, found.head, True, NO_TARGET)
    if not mask.any():
        # a head that sees a target overrules the empty mask: not "nothing", only not found
        return Segmentation(mask, values, float(1 - values.max()), found.head is None, NO_PIXEL)
    return Segmentation(mask, values, float(values[mask].mean(dtype=np.float64)), False, INSIDE)


def find_images(sources: Sequence[str]) -> list[str]:
    """List the image files that arguments name, each once, in the order given; folders and patterns are sorted.

    A folder stands for the files in it that have an image's ending, a pattern (`*`, `?`, `[...]`; `**` for all
    subfolders) for the files that match it and have one. A file given by name may have any ending.
    Raises UserError for a URL, and for a source that names nothing.
    """
    return list(dict.fromkeys(path for source in sources for path in _expand(source)))


def _expand(source: str) -> list[str]:
    if "://" in source:
        raise UserError(f"{source} is a URL, and nothing is downloaded here; save the image and give its file name")
    if os.path.isdir(source):
        found = _images(os.path.join(source, name) for name in os.listdir(source))
        if not found:
            raise UserError(f"there is no image in the folder {source}; for its subfolders give '{source}/**/*'")
        return found
    if os.path.exists(source):
        return [source]
    if glob.has_magic(source):
        found = _images(glob.iglob(source, recursive=True))
        if not found:
            raise UserError(f"no image matches {source!r}")
        return found
    raise UserError(f"there is no image {source}")


def _images(paths: Iterable[str]) -> list[str]:
    endings = Image.registered_extensions()
    return sorted(p for p in paths if os.path.splitext(p)[1].lower() in endings and os.path.isfile(p))


def load_image(source: ImageSource) -> Image.Image:
    """Return an image as upright RGB; `source` as in `Predictor.__call__`.

    Raises UserError for a URL, a file that cannot be read, and an array of another shape or type.
    """
    if isinstance(source, Image.Image):
        return to_rgb(ImageOps.exif_transpose(source))
    if isinstance(source, np.ndarray):
        return _from_array(source)
    if isinstance(source, (str, Path)):
        if Path(source).is_dir() or (glob.has_magic(str(source)) and not Path(source).exists()):
            raise UserError(
                f"{source} is several images; go through them with Predictor.each({str(source)!r}, sentence)"
            )
        return read_image(source)
    several = "; several images go to Predictor.each" if isinstance(source, Iterable) else ""
    raise UserError(f"an image is a {type(source).__name__}; give a path, a PIL image or a numpy array{several}")


def _from_array(array: NDArray[np.generic]) -> Image.Image:
    grey = array.ndim == 2 and array.dtype in (np.uint8, np.uint16)
    colour = array.ndim == 3 and array.shape[2] in (3, 4) and array.dtype == np.uint8
    if array.size and (grey or colour):
        return to_rgb(Image.fromarray(np.ascontiguousarray(array)))
    shape = " x ".join(str(n) for n in array.shape)
    raise UserError(
        f"an image is an array of shape {shape} and type {array.dtype}; give uint8 of [height, width, 3] or "
        "[height, width]"
    )


def read_image(path: str | Path) -> Image.Image:
    """Read an image file as RGB, upright. Raises UserError for a URL, or a file that is missing or not an image."""
    if "://" in str(path):
        raise UserError(f"{path} is a URL, and nothing is downloaded here; save the image and give its file name")
    if not Path(path).exists():
        raise UserError(f"there is no image {path}")
    if not Path(path).is_file():  # reading a named pipe would block forever
        raise UserError(f"{path} is not an image file")
    try:
        with Image.open(path) as image:
            return to_rgb(ImageOps.exif_transpose(image), str(path))
    except UserError:
        raise
    except Exception as error:  # Pillow's decoders raise many kinds for damaged files
        raise UserError(f"{path} cannot be read as an image ({first_line(error)}); is it truncated?") from error
