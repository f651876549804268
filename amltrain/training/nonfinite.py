"""Undo the changes of a non-finite step, list its samples, and detect non-finite weights."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from amltrain.data.dataset import ReferDataset
from amltrain.errors import UserError


class NormStatistics:
    """Running statistics of a model's batch norms. A forward pass changes them before anybody knows that it is NaN."""

    def __init__(self, model: nn.Module) -> None:
        norms = [module for module in model.modules() if isinstance(module, _NormBase)]
        self.live: list[Tensor] = [buffer for norm in norms for buffer in norm.buffers(recurse=False)]
        self.kept = [buffer.clone() for buffer in self.live]

    def keep(self) -> None:
        """Remember them as they are; before every optimizer step."""
        for kept, live in zip(self.kept, self.live, strict=True):
            kept.copy_(live)

    def take_back(self) -> None:
        """Restore the saved values."""
        for kept, live in zip(self.kept, self.live, strict=True):
            live.copy_(kept)


def describe_samples(dataset: ReferDataset, sample_ids: Iterable[int]) -> list[dict[str, Any]]:
    """Ids by which a user finds samples in the original files."""
    infos = [(sample_id, dataset.info(sample_id)) for sample_id in sample_ids]
    return [
        {"sample_id": sample_id, "dataset": info.dataset, "image_id": info.image_id, "ref_id": info.ref_id}
        for sample_id, info in infos
    ]


def check_weights(weights: Mapping[str, Tensor], step: int, last_good: str) -> None:
    """Raise UserError if a weight is NaN or infinite: an optimizer can produce them from finite gradients."""
    floats = {name: tensor for name, tensor in weights.items() if tensor.is_floating_point()}
    finite = torch.stack([tensor.isfinite().all().cpu() for tensor in floats.values()]) if floats else torch.ones(1)
    if not finite.all():
        name = list(floats)[int(finite.logical_not().nonzero()[0])]
        raise UserError(
            f"the weights are not finite after step {step} ({name}) and were not saved; lower optim.lr or raise "
            f"optim.eps (last good checkpoint: {last_good})"
        )
