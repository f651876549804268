"""One image and some sentences in, masks at the image's own size out.

from amltrain import Predictor
predictor = Predictor.from_pretrained("runs/quickstart/last/model")
prediction, = predictor(Image.open("street.jpg"), "the red car on the left")
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor

from amltrain.data.images import to_rgb
from amltrain.data.loaders import build_transform
from amltrain.data.transforms import normalise
from amltrain.errors import UserError
from amltrain.evaluation.masks import original_probability
from amltrain.hub.model_folder import Pretrained, load_pretrained
from amltrain.records import Batch, ModelOutput


class Segmentation(NamedTuple):
    """What a sentence means in an image of h x w pixels.

    mask         [h, w] bool; all False where the sentence means nothing
    probability  [h, w] float32, 0..1 of the referent at every pixel
    confidence   0..1: mean probability inside the mask, or of "nothing in this image" where the model has a head for it
    nothing      the sentence means nothing in this image: said by the model's no-target head, by the protocol's pixel
                 count, or because no pixel passes the threshold
    """

    mask: NDArray[np.bool_]
    probability: NDArray[np.float32]
    confidence: float
    nothing: bool


class Predictor:
    """A loaded model with its own preprocessing; runs in fp32, without gradient, on any device."""

    def __init__(self, pretrained: Pretrained, device: str | torch.device = "cpu", batch_size: int = 8) -> None:
        if pretrained.tokenizer is None:
            raise UserError(f"{pretrained.folder} has no tokenizer files; save or convert it again with a tokenizer")
        self.model = pretrained.model.eval().to(device)
        self.protocol = pretrained.protocol
        self.tokenizer = pretrained.tokenizer
        self.transform = build_transform(pretrained.preprocess)
        self.device, self.batch_size = torch.device(device), batch_size

    @classmethod
    def from_pretrained(cls, source: str | Path, device: str | torch.device = "cpu") -> "Predictor":
        """A predictor from a model folder, a checkpoint folder or a Hub repository; see `load_pretrained`."""
        return cls(load_pretrained(source), device)

    def __call__(self, image: Image.Image, sentences: str | Sequence[str]) -> list[Segmentation]:
        """Segment what each sentence means.

        image: any size and any mode that `to_rgb` takes; an EXIF rotation is applied first, so masks fit the image as
        viewers show it. Raises UserError for an empty sentence or an image of float pixels.
        """
        sentences = [sentences] if isinstance(sentences, str) else list(sentences)
        if not all(s.strip() for s in sentences):
            raise UserError("a sentence is empty; say what to look for")
        image = to_rgb(ImageOps.exif_transpose(image))
        pixels, _, geometry = self.transform(image, None)
        found: list[Segmentation] = []
        for start in range(0, len(sentences), self.batch_size):
            batch = self._batch(pixels, geometry, sentences[start : start + self.batch_size])
            with torch.no_grad():
                output = self.model(batch)
            found += self._segmentations(output, batch)
        return found

    def _batch(self, pixels: Tensor, geometry: Tensor, sentences: list[str]) -> Batch:
        count = len(sentences)
        tokens = [self.tokenizer(s) for s in sentences]
        none = torch.zeros(count, dtype=torch.int64, device=self.device)
        return Batch(
            image=normalise(pixels.to(self.device), self.transform.normalization).expand(count, -1, -1, -1),
            input_ids=torch.stack([ids for ids, _ in tokens]).to(self.device),
            text_mask=torch.stack([mask for _, mask in tokens]).to(self.device),
            target=torch.zeros(count, *pixels.shape[-2:], dtype=torch.uint8, device=self.device),
            no_target=none.bool(),
            sample_id=torch.arange(count, device=self.device),
            random_key=none,
            geometry=geometry.expand(count, -1),
        )

    def _segmentations(self, output: ModelOutput, batch: Batch) -> list[Segmentation]:
        size = (batch.image.shape[-2], batch.image.shape[-1])
        maps = original_probability(output.logits, size, batch.geometry.tolist(), self.protocol.interpolation)
        head = output.aux["no_target"].float().softmax(1)[:, 1].tolist() if "no_target" in output.aux else None
        return [self._segmentation(p.clamp(0, 1), head[i] if head else None) for i, p in enumerate(maps)]

    def _segmentation(self, probability: Tensor, none: float | None) -> Segmentation:
        values = probability.cpu().numpy()
        mask = values > self.protocol.threshold
        nothing = mask.sum() < max(1, self.protocol.no_target_pixels) if none is None else none > 0.5
        if nothing:
            confidence = float(1 - values.max()) if none is None else none
            return Segmentation(np.zeros_like(mask), values, confidence, True)
        return Segmentation(mask, values, float(values[mask].mean()) if mask.any() else 0.0, False)


def read_image(path: str | Path) -> Image.Image:
    """Read an image file as RGB, upright. Raises UserError for a file that is absent, truncated or no image."""
    try:
        with Image.open(path) as image:
            return to_rgb(ImageOps.exif_transpose(image), str(path))
    except FileNotFoundError as error:
        raise UserError(f"there is no image {path}") from error
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"{path} cannot be read as an image ({error}); is it truncated?") from error
