"""Remembered alignment scores, for models whose scored encoders never change (DETRIS's frozen towers).

A score is then a function of image and sentence. The cache lives in memory on the host, 2 bytes per patch: 2 KB for
32 x 32 patches, 0.25 GB for all 120,624 training sentences of RefCOCO. Each process has its own and starts empty,
also after a resume. Looking keys up reads the batch's ids from the device, the one wait that caching costs.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from amltrain.errors import UserError
from amltrain.records import Batch

Key = tuple[int, bytes]


class ScoreCache:
    """Scores by (sample, tokens): the same referent may come with another sentence next time."""

    def __init__(self) -> None:
        self.known: dict[Key, Tensor] = {}

    @torch.compiler.disable
    def __call__(self, batch: Batch, compute: Callable[[Batch], Tensor]) -> Tensor:
        """Scores [B, h, w] float32 of a batch; only samples that are not known are computed, as a smaller batch.

        Fresh scores are rounded to float16 as well, so a score is the same the first time and the hundredth.
        """
        keys = batch_keys(batch)
        missing = [i for i, key in enumerate(keys) if key not in self.known]
        if missing:
            rows = torch.tensor(missing, device=batch.image.device)
            fresh = compute(batch.mapped(lambda part: part[rows]))
            for i, scores in zip(missing, fresh.half().cpu(), strict=True):
                self.known[keys[i]] = scores.clone()
        return torch.stack([self.known[key] for key in keys]).to(batch.image.device).float()


def batch_keys(batch: Batch) -> list[Key]:
    ids = batch.input_ids.cpu().numpy()
    return [(sample, row.tobytes()) for sample, row in zip(batch.sample_id.tolist(), ids, strict=True)]


def refuse_sharded(model: nn.Module) -> None:
    """Raise UserError where weights are spread over ranks: a rank that skips stage 1 would leave the others waiting."""
    if any(hasattr(p, "ds_id") or hasattr(p, "device_mesh") for p in model.parameters()):
        raise UserError(
            "aml.cache_scores does not work with weights sharded by FSDP or ZeRO-3, whose ranks must all run stage 1; "
            "set it to false or train with DDP"
        )
