"""Other ways to compute the same step."""

import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from amltrain.environment import choose_device
from amltrain.methods.base import Method
from amltrain.records import Batch
from benchmarks.steps import AUTOCAST
from benchmarks.suite.common import build_supervised, clock_of, make_batch, seconds_of, set_precision, side_of

AS_TRAINED = "as trained"
MATRICES = "attention as matrix products"
CHANNELS_LAST = "channels-last maps"


def variants(*, device: str, model: str, size: int | None, batch: int, rounds: int, precision: str) -> dict[str, Any]:
    """Seconds of forward and backward without AML, in interleaved rounds; the first is how the trainer computes.

    Its attention, with the position bias of Swin and the mask of BERT, is `scaled_dot_product_attention`.
    """
    chosen, autocast = choose_device(device), AUTOCAST[set_precision(precision)]
    side = side_of(model, size)
    method = build_supervised(model).to(chosen).train()
    data, clock = make_batch(model, batch, side, chosen), clock_of(chosen)
    losses: dict[str, float] = {}

    def step(given: Batch) -> torch.Tensor:
        torch.manual_seed(0)
        with torch.autocast(chosen.type, autocast, enabled=autocast is not None):
            loss = method(given)["loss"]
        loss.backward()
        method.zero_grad()
        return loss.detach()

    seconds: dict[str, list[float]] = {AS_TRAINED: [], MATRICES: [], CHANNELS_LAST: []}
    for number in range(rounds + 1):
        for name, found in seconds.items():
            with _variant(name, method, data) as given:
                losses[name] = float(step(given)) if number == 0 else losses[name]
                if number:
                    found.append(seconds_of(lambda given=given: step(given), clock))  # type: ignore[misc]
    first, loss = seconds[AS_TRAINED], losses[AS_TRAINED]
    rows = [
        {
            "variant": name,
            "seconds": statistics.median(found),
            "ratio": statistics.median(own / other for own, other in zip(found, first, strict=True)),
            "difference": abs(losses[name] - loss) / abs(loss),
        }
        for name, found in seconds.items()
    ]
    return {"size": side, "batch": batch, "rows": rows}


@contextmanager
def _variant(name: str, method: Method, data: Batch) -> Iterator[Batch]:
    if name == MATRICES:
        with sdpa_kernel(SDPBackend.MATH):
            yield data
    elif name == CHANNELS_LAST:
        method.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        yield data._replace(image=data.image.contiguous(memory_format=torch.channels_last))
        method.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    else:
        yield data
