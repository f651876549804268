"""Encode once: run the image encoder once for all sentences of an image.

Works for models that offer `encode_image` and `encode_with_image` (see `RISModel`). A split keeps the sentences of an
image next to each other, so most of them share a batch; the last image's features are kept for the next batch.
"""

from typing import Any

import torch
from torch import Tensor

from amltrain.models.base import RISModel
from amltrain.records import Batch, ModelOutput


def shares_images(model: Any, dataset: Any) -> bool:
    """Whether the model can encode an image alone and the data set knows which samples show the same picture."""
    return isinstance(model, RISModel) and model.encodes_image_alone and hasattr(dataset, "image_groups")


class ImageCache:
    """A model's forward in which every image of a batch is encoded once."""

    def __init__(self, model: RISModel, dataset: Any) -> None:
        """dataset.image_groups(): [samples] int64, equal for samples whose network input is the same picture."""
        self.model = model
        self.groups = dataset.image_groups()
        self.last: tuple[int, tuple[Tensor, ...]] | None = None
        self.encoded = 0
        """Images encoded so far."""

    def __call__(self, batch: Batch, host: Batch) -> ModelOutput:
        """The output of `model(batch)`. host: the same batch on the CPU, whose ids are read."""
        groups = self.groups[host.sample_id.numpy()].tolist()
        known = dict([self.last]) if self.last else {}
        first = {g: i for i, g in reversed(list(enumerate(groups))) if g not in known}
        new = sorted(first.values())
        if new:
            chosen = torch.tensor(new, device=batch.image.device)
            maps = self.model.encode_image(batch.image[chosen])
            known |= {groups[i]: tuple(m[k : k + 1] for m in maps) for k, i in enumerate(new)}
            self.encoded += len(new)
        self.last = groups[-1], known[groups[-1]]
        image = tuple(torch.cat(level) for level in zip(*(known[g] for g in groups), strict=True))
        return self.model.decode(self.model.encode_with_image(batch, image), batch)
