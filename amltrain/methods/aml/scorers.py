"""What AML scores: encoder features (early), fused features (late), or the model's own prediction (pred).

Every scorer returns alignment scores [B, h, w] float32 in 0..1. Early and late features go through PMME, or give a
score themselves: their cosine, or a projection trained on the ground truth. The prediction is a score already. The
model is an argument of every call, so a scorer holds no second reference to it.
"""

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from amltrain.errors import UserError
from amltrain.methods.aml.grounded import GroundedProjection
from amltrain.methods.aml.similarity import PatchScorer
from amltrain.methods.aml.temperature import Calibration, solve_temperature
from amltrain.methods.base import Reduce
from amltrain.models.base import RISModel
from amltrain.models.eval_mode import eval_mode
from amltrain.records import AlignmentFeatures, Batch, Features, ModelOutput


class EarlyScorer(PatchScorer):
    """PMME of the features before cross-modal fusion (the paper's choice).

    fused: whether the image features have read their own sentence, so that another one needs another pass.
    """

    fused = False

    def __init__(
        self, projection: nn.Module, *, text: str | None = None, visual: str | None = None, **pmme: Any
    ) -> None:
        """text, visual: which of its features a model that offers a choice gives; see `RISModel.alignment_features`.
        pmme: arguments of PatchScorer."""
        super().__init__(projection, **pmme)
        self.text, self.visual = text, visual

    def features(
        self, model: RISModel, batch: Batch, features: Features | None = None, output: ModelOutput | None = None
    ) -> AlignmentFeatures:
        """Return the features to score, computed as in stage 1."""
        with stage1(model, batch.image.device.type):
            scored = model.alignment_features(batch, features, text=self.text, visual=self.visual)
        return AlignmentFeatures(*(part.detach() for part in scored))  # given features carry gradient

    def forward(  # type: ignore[override]  # finds the features itself
        self, model: RISModel, batch: Batch, features: Features | None = None, output: ModelOutput | None = None
    ) -> Tensor:
        """Scores [B, h, w] float32 in [1/L, 1]; without gradient except with a learnable projection."""
        return self.score(self.features(model, batch, features, output))


class LateScorer(EarlyScorer):
    """PMME of the features after cross-modal fusion (Table 6)."""

    fused = True

    def features(
        self, model: RISModel, batch: Batch, features: Features | None = None, output: ModelOutput | None = None
    ) -> AlignmentFeatures:
        with stage1(model, batch.image.device.type):
            output = _decoded(model, batch, features, output)
        return AlignmentFeatures(
            output.aux["fused_visual"].detach(), output.aux["fused_text"].detach(), batch.text_mask
        )


class DirectScorer(nn.Module):
    """Scores that a projection gives itself, such as cosines (ours): no softmax over tokens and no temperature."""

    calibrated = True

    def __init__(self, projection: nn.Module, source: EarlyScorer) -> None:
        """projection: AlignmentFeatures -> scores [B, h, w] in 0..1. source: a scorer whose features are scored."""
        super().__init__()
        self.projection = projection
        self._source = [source]  # in a list: its projection is not a part of this module
        self.fused = source.fused

    def features(
        self, model: RISModel, batch: Batch, features: Features | None = None, output: ModelOutput | None = None
    ) -> AlignmentFeatures:
        """Return the features to score, computed as in stage 1."""
        return self._source[0].features(model, batch, features, output)

    def score(self, features: AlignmentFeatures) -> Tensor:
        """Scores [B, h, w] float32, with gradient for the projection alone."""
        return self.projection(features)

    def forward(
        self, model: RISModel, batch: Batch, features: Features | None = None, output: ModelOutput | None = None
    ) -> Tensor:
        """As `score`, of this model's features."""
        return self.score(self.features(model, batch, features, output))


class GroundedScorer(DirectScorer):
    """The probability that a projection trained on the ground truth gives (ours)."""

    projection: GroundedProjection


class PredictionScorer(nn.Module):
    """The predicted probability of the referent (Table 6, "pred"); it has no temperature."""

    calibrated = True
    followed: Tensor

    def __init__(self, model: RISModel | None = None, decay: float | None = None) -> None:
        """decay: predict with an average of the weights over the steps, which starts as a copy of `model` (ours)."""
        super().__init__()
        self.decay = decay
        self.average: RISModel | None = None
        if model is not None and decay is not None:
            self.average = copy.deepcopy(model).requires_grad_(False)
            self.register_buffer("followed", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def follow(self, model: RISModel, step: int) -> None:
        """Move the average one step: `decay * average + (1 - decay) * weights` of the model. Buffers are copied.

        step: optimizer steps that the model has done. A step is followed once, also where a run stopped inside the next
        one and does it again.
        """
        if self.average is None or self.decay is None:
            return
        weight = (1 - self.decay) * (self.followed < step).float()  # on the device: nothing waits for it
        self.followed.fill_(step)
        for ours, theirs in zip(self.average.parameters(), model.parameters(), strict=True):
            ours.lerp_(theirs, weight.to(ours.dtype))
        for kept, given in zip(self.average.buffers(), model.buffers(), strict=True):
            kept.copy_(given)

    def forward(
        self, model: RISModel, batch: Batch, features: Features | None = None, output: ModelOutput | None = None
    ) -> Tensor:
        """Probabilities [B, h, w] float32 in 0..1 at the size of the model's logits, without gradient."""
        if self.average is not None:
            model, features, output = self.average, None, None
        with stage1(model, batch.image.device.type):
            logits = _decoded(model, batch, features, output).logits.detach().float()
        return logits.softmax(1)[:, 1] if logits.shape[1] == 2 else logits.sigmoid()[:, 0]


Scorer = EarlyScorer | DirectScorer | PredictionScorer


def _decoded(model: RISModel, batch: Batch, features: Features | None, output: ModelOutput | None) -> ModelOutput:
    if output is not None:
        return output
    return model.decode(model.encode(batch) if features is None else features, batch)


@contextmanager
def stage1(model: RISModel, device: str) -> Iterator[None]:
    """Run AML's stage 1: no gradient, evaluation mode, and no cached half-precision weights.

    A half-precision copy of a weight made without gradient must not be found again by autocast in stage 2.
    """
    uncached = torch.autocast(device, dtype=torch.get_autocast_dtype(device), cache_enabled=False)
    with torch.no_grad(), eval_mode(model), uncached if torch.is_autocast_enabled(device) else nullcontext():
        yield


def shrunk(batch: Batch, size: int | None) -> Batch:
    """The batch with its images at `size` x `size` pixels; None = as it is."""
    if size is None:
        return batch
    smaller = F.interpolate(batch.image, (size, size), mode="bilinear", align_corners=False, antialias=True)
    return batch._replace(image=smaller)


def calibrate(scorer: EarlyScorer, scored: Iterable[AlignmentFeatures], reduce: Reduce | None = None) -> Calibration:
    """Solve the temperature of a scorer on features of this process and store it in the scorer's buffers."""
    pairs = [(scorer.logits(features), scorer.token_mask(features)) for features in scored]
    if not pairs:
        raise UserError("aml.temperature=auto needs at least one batch to be solved on; there was none")
    calibration = solve_temperature(pairs, reduce=reduce)
    scorer.temperature.fill_(calibration.temperature)
    scorer.calibrated.fill_(True)
    return calibration
