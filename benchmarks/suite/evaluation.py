"""Forward passes of an evaluation."""

import statistics
from typing import Any

import torch
from torch import Tensor

from amltrain.environment import choose_device
from amltrain.evaluation.evaluator import ImageCache
from amltrain.models import create_model
from amltrain.models.base import eval_mode
from benchmarks.steps import AUTOCAST
from benchmarks.suite.common import clock_of, make_batch, seconds_of, set_precision, side_of

SENTENCES = 3
"""Sentences of an image. RefCOCO's val has 7.2 an image; three are a referent's."""


class _Groups:
    """Stands for a data set: which samples show the same image."""

    def __init__(self, groups: Tensor) -> None:
        self.groups = groups

    def image_groups(self) -> Tensor:
        return self.groups


def evaluation(*, device: str, model: str, size: int | None, batch: int, precision: str, rounds: int) -> dict[str, Any]:
    """Samples per second where every sentence's image is encoded, and where every image is encoded once."""
    chosen, autocast, side = choose_device(device), AUTOCAST[set_precision(precision)], side_of(model, size)
    built = create_model(model).to(chosen)
    if not built.encodes_image_alone:
        return {"note": "the image encoder reads the sentence: every sentence needs its own pass"}
    data = make_batch(model, batch, side, chosen)
    host = data.mapped(lambda part: part.cpu())
    cache = ImageCache(built, _Groups(torch.arange((rounds + 1) * batch) // SENTENCES))
    clock = clock_of(chosen)
    seconds: dict[str, list[float]] = {"sentence": [], "image": []}
    with torch.no_grad(), eval_mode(built), torch.autocast(chosen.type, autocast, enabled=autocast is not None):
        for number in range(rounds + 1):
            ids = host._replace(sample_id=host.sample_id + number * batch)
            seconds["sentence"].append(seconds_of(lambda: built(data), clock))
            seconds["image"].append(seconds_of(lambda ids=ids: cache(data, ids), clock))  # type: ignore[misc]
    rates = {name: batch / statistics.median(values[1:]) for name, values in seconds.items()}
    return {"size": side, "batch": batch, "sentences": SENTENCES, "rates": rates}
