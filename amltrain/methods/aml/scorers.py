"""A score that is trained on the ground truth (ours): is this patch inside the object that the sentence refers to?

Two linear maps compare a patch with the mean of the sentence's tokens. They learn beside the model: features are
detached, and the loss is scaled down so far that it does not change how the model's gradient is clipped. Adam divides
the scale out again, so the maps learn at the full rate.

Dimensions: B batch, N patches, h w score map, L text tokens, C_v C_t widths of the two encoders, D projection width.

Remembered alignment scores, for models whose scored encoders never change (DETRIS's frozen towers).

A score is then a function of image and sentence. The cache lives in memory on the host, 2 bytes per patch: 2 KB for
32 x 32 patches, 0.25 GB for all 120,624 training sentences of RefCOCO. Each process has its own and starts empty,
also after a resume. Looking keys up reads the batch's ids from the device, the one wait that caching costs.

What AML scores: encoder features (early), fused features (late), or the model's own prediction (pred).

Every scorer returns alignment scores [B, h, w] float32 in 0..1. Early and late features go through PMME, or give a
score themselves: their cosine, or a projection trained on the ground truth. The prediction is a score already. The
model is an argument of every call, so a scorer holds no second reference to it.
"""

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from amltrain.data.augment import BACKGROUND, OTHER, REFERENT
from amltrain.errors import UserError
from amltrain.methods.aml.similarity import Calibration, PatchScorer, gaussian_projections, solve_temperature
from amltrain.methods.base import Reduce
from amltrain.models.base import RISModel, eval_mode
from amltrain.records import AlignmentFeatures, Batch, Features, ModelOutput

GROUNDING_SCALE = 1e-2
"""Of the maps' loss; see the file's head."""
START_SCALE = 10.0
"""Factor of the similarity of unit vectors at the start; it is trained."""


class GroundedProjection(nn.Module):
    """Probability of every patch to lie inside the referent."""

    def __init__(self, visual_dim: int, text_dim: int, *, dim: int, seed: int = 0) -> None:
        super().__init__()
        visual, text = gaussian_projections(visual_dim, text_dim, dim, seed)
        self.visual, self.text = nn.Parameter(visual), nn.Parameter(text)
        self.scale, self.bias = nn.Parameter(torch.tensor(START_SCALE)), nn.Parameter(torch.zeros(()))

    def forward(self, features: AlignmentFeatures) -> Tensor:
        """Probabilities [B, h, w] float32, with gradient for the maps alone; `features` are used as they are."""
        with torch.autocast(features.visual.device.type, enabled=False):
            visual = _standardised(features.visual.float().flatten(2).transpose(1, 2))
            real = features.text_mask[..., None].float()
            text = (_standardised(features.text.float()) * real).sum(1) / real.sum(1).clamp(min=1)
            query = F.linear(F.linear(text, self.text.float()), self.visual.float().T)  # [B, C_v]
            logits = self.scale.float() * torch.einsum("bnc,bc->bn", visual, query) + self.bias.float()
            return logits.sigmoid().unflatten(1, features.visual.shape[-2:])


def _standardised(vectors: Tensor) -> Tensor:
    """Vectors [..., C] with mean 0 and length 1."""
    return F.normalize(vectors - vectors.mean(-1, keepdim=True), dim=-1)


def grounding_loss(scores: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy of probabilities [B, h, w] against the share of each patch inside the referent, [].

    target [B, H, W] uint8, 255 = referent. Referent and background weigh the same in a batch, whatever their areas.
    """
    inside = F.adaptive_avg_pool2d(target[:, None].float() / 255, (scores.shape[-2], scores.shape[-1]))[:, 0]
    scores = scores.float().clamp(1e-6, 1 - 1e-6)
    hit = (inside * scores.log()).sum() / inside.sum().clamp(min=1e-6)
    miss = ((1 - inside) * (1 - scores).log()).sum() / (1 - inside).sum().clamp(min=1e-6)
    return -(hit + miss) / 2


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
    """One key per sample of a batch: its id and its token ids."""
    ids = batch.input_ids.cpu().numpy()
    return [(sample, row.tobytes()) for sample, row in zip(batch.sample_id.tolist(), ids, strict=True)]


def reject_sharded(model: nn.Module) -> None:
    """Raise UserError where weights are spread over ranks: a rank that skips stage 1 would leave the others waiting."""
    if any(hasattr(p, "ds_id") or hasattr(p, "device_mesh") for p in model.parameters()):
        raise UserError(
            "aml.cache_scores does not work with weights sharded by FSDP or ZeRO-3, whose ranks must all run stage 1; "
            "set it to false or train with DDP"
        )


class EarlyScorer(PatchScorer):
    """PMME of the features before cross-modal fusion (the paper's choice).

    fused: whether the image features have read their own sentence, so that another one needs another pass.
    """

    fused = False

    def __init__(
        self, projection: nn.Module, *, text: str | None = None, visual: str | None = None, **pmme: Any
    ) -> None:
        """text, visual: which of its features a model that offers a choice gives; see `RISModel.alignment_features`.
        pmme: arguments of PatchScorer.
        """
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


class OracleScorer(nn.Module):
    """Scores from the ground truth (ours): what the best score could do, as a control."""

    calibrated = True

    def __init__(self, order: str, block: int) -> None:
        """order: `aml.oracle`. block: side of a score's block, pixels."""
        super().__init__()
        self.order, self.block = order, block

    def forward(
        self, model: RISModel, batch: Batch, features: Features | None = None, output: ModelOutput | None = None
    ) -> Tensor:
        """Scores [B, r, c] float32, one per block: 1 with a pixel of the referent, else 0 or, with an order, 0.5.

        A block with a pixel of another referent of the picture is a distractor. Raises UserError for data without
        `batch.regions`.
        """
        if batch.regions is None:
            raise UserError("aml.features=oracle reads the annotations' regions, which only training data has")
        padded = F.pad(
            batch.regions, (0, -batch.regions.shape[-1] % self.block, 0, -batch.regions.shape[-2] % self.block)
        )
        highest = F.max_pool2d(padded[:, None].float(), self.block)[:, 0]
        first = {"background_first": OTHER, "distractors_first": BACKGROUND}.get(self.order)
        scores = (highest == REFERENT).float()
        return scores if first is None else scores + 0.5 * (highest == first).float()


Scorer = EarlyScorer | DirectScorer | PredictionScorer | OracleScorer


def _decoded(model: RISModel, batch: Batch, features: Features | None, output: ModelOutput | None) -> ModelOutput:
    if output is not None:
        return output
    return model.decode(model.encode(batch) if features is None else features, batch)


def confidence(model: RISModel, batch: Batch, features: Features | None, output: ModelOutput | None) -> Tensor:
    """Mean |2p - 1| of the predicted mask's pixels, [B] float32 in 0..1, without gradient (`aml.dynamic_tau`)."""
    return (2 * PredictionScorer()(model, batch, features, output) - 1).abs().flatten(1).mean(1)


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
