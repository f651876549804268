"""AML, alignment-aware masked learning: score the image against the words, mask what does not align, train on the rest.

Stage 1 scores the original image without gradient; stage 2 trains the same model on the masked image (ICLR 2026, arXiv
2602.22740; public code pipashu1/AMLRIS at 930e56b, which has no licence file: nothing of it is copied). Where the
unmasked image is encoded with gradient anyway (`clean_loss_weight` above 0, `level: feature`), those training-mode
features are scored instead of paying for another pass, as the public code does.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from amltrain.data.dataset import ReferDataset
from amltrain.errors import UserError
from amltrain.losses import check_weighs_pixels
from amltrain.methods.aml.masker import AlignmentMasker, Probe, build_alignment_masker, describe_calibration
from amltrain.methods.aml.options import AMLOptions, resolve
from amltrain.methods.aml.recorder import AlignmentDiagnostics, alignment_sums, build_alignment_diagnostics
from amltrain.methods.aml.scorers import (
    GROUNDING_SCALE,
    EarlyScorer,
    GroundedScorer,
    PredictionScorer,
    Scorer,
    calibrate,
    grounding_loss,
)
from amltrain.methods.aml.similarity import Calibration
from amltrain.methods.base import Method, Reduce, mask_image, register_method, spread_blocks, with_image
from amltrain.models.base import RISModel
from amltrain.records import AlignmentFeatures, Batch, Features, ModelOutput, Vocabulary

Level = Literal["image", "feature", "random", "loss"]
SOFT_GATE_WIDTH = 0.1  # of the straight-through gradient: scores this far from tau still learn


class AML(Method):
    """Alignment-aware masked learning around any registered model.

    forward(batch) returns "loss" [] and, detached: the loss's own values (prefixed `clean_` for the unmasked image),
    "masked_share" [] of the blocks and "mean_score" [] of the patches. Nothing waits for the device.
    """

    hides_images = True

    def __init__(
        self,
        model: RISModel,
        loss: nn.Module,
        masker: AlignmentMasker,
        *,
        preset: str = "paper",
        level: Level = "image",
        soft: bool = False,
        clean_loss_weight: float = 0.0,
        calibrate_every: int | None = None,
        diagnostics_every: int | None = None,
    ) -> None:
        """soft: with level loss, weigh pixels by their scores. calibrate_every: steps between new solutions of the
        temperature. diagnostics_every: steps between rows of alignment statistics; forward then also returns "scores"
        [B, h, w], "blocks" [B, r, c] and "alignment", the sums of `statistics`.
        """
        super().__init__(model, loss)
        self.masker = masker
        self.preset = preset
        self.level, self.soft = level, soft
        self.needs_regions = masker.needs_regions
        if level == "loss":
            check_weighs_pixels(loss, "aml.level=loss")
        self.clean_loss_weight = clean_loss_weight
        self.calibrate_every = calibrate_every
        self.diagnostics_every = diagnostics_every
        averages = isinstance(masker.scorer, PredictionScorer) and masker.scorer.decay is not None
        self.before_step_needs_weights = calibrate_every is not None or averages

    @property
    def scorer(self) -> Scorer:
        return self.masker.scorer

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Return one training step's loss; see the class."""
        if self.level == "feature":
            return self._suppress_features(batch)
        if self.clean_loss_weight:
            return self._train_on_both(batch)
        probe = self.probe(batch)
        blocks = self.blocks(probe.scores, batch, self.masker.factors(self.model, batch))
        if self.level == "loss":
            weighed = batch._replace(loss_weight=self.loss_weights(blocks, probe.scores, batch))
            return self._with_extras(self.loss(self.model(batch), weighed), probe, blocks, batch)
        masked = with_image(batch, self.masked_image(batch.image, blocks, probe.scores), blocks, self.masker.block)
        return self._with_extras(self.loss(self.model(masked), masked), probe, blocks, batch)

    def loss_weights(self, blocks: Tensor, scores: Tensor, batch: Batch) -> Tensor:
        """How much a pixel counts in the loss (level loss), [B, H, W] float32: 0 in the blocks [B, r, c], 1 outside.

        soft: instead the scores [B, h, w], resized bilinearly.
        """
        size = (batch.image.shape[-2], batch.image.shape[-1])
        if self.soft:
            return F.interpolate(scores.detach()[:, None].float(), size, mode="bilinear", align_corners=False)[:, 0]
        return 1 - spread_blocks(blocks.float(), size, self.masker.block)

    def _train_on_both(self, batch: Batch) -> dict[str, Tensor]:
        """Both losses over one shared pass over the unmasked image, whose text features serve the masked one too."""
        features = self.model.encode(batch)
        output = self.model.decode(features, batch)
        probe = self.probe(batch, features, output)
        blocks = self.blocks(probe.scores, batch, self.masker.factors(self.model, batch, features, output))
        masked = with_image(batch, self.masked_image(batch.image, blocks, probe.scores), blocks, self.masker.block)
        clean = self.loss(output, batch)
        result = self.loss(self.model.decode(self.model.reencode_image(masked, features), masked), masked)
        total = self.clean_loss_weight * clean["loss"] + (1 - self.clean_loss_weight) * result["loss"]
        values = {f"clean_{name}": value.detach() for name, value in clean.items()}
        masked_loss = {"masked_loss": result["loss"].detach()}
        return self._with_extras({**result, **values, **masked_loss, "loss": total}, probe, blocks, batch)

    def _suppress_features(self, batch: Batch) -> dict[str, Tensor]:
        """Hide the weak positions from the decoder's attention; the image stays whole, so one encoding serves both."""
        features = self.model.encode(batch)
        probe = self.probe(batch, features)
        blocks = self.blocks(probe.scores, batch, self.masker.factors(self.model, batch, features))
        size = features.visual[-1].shape[-2:]
        suppressed = F.interpolate(blocks[:, None].float(), size)[:, 0] > 0.5
        output = self.model.decode(features._replace(suppressed=suppressed), batch)
        return self._with_extras(self.loss(output, batch), probe, blocks, batch)

    def probe(self, batch: Batch, features: Features | None = None, output: ModelOutput | None = None) -> Probe:
        """`score`; with diagnostics, also what the scores are compared with."""
        if self.diagnostics_every is None:
            return Probe(self.score(batch, features, output))
        return self.masker.probe(self.model, batch, features, output)

    def score(self, batch: Batch, features: Features | None = None, output: ModelOutput | None = None) -> Tensor:
        """Stage 1: alignment scores [B, h, w] float32; without gradient except with a trained projection.

        features, output: of the unmasked image, where the caller has them already (in training mode).
        """
        return self.masker.scores(self.model, batch, features, output)

    def blocks(self, scores: Tensor, batch: Batch, factors: Tensor | None = None) -> Tensor:
        """AFM's decision [B, r, c] bool, True = mask this block. factors: of the masker, for `aml.dynamic_tau`."""
        return self.masker.blocks(scores, batch, factors)

    def masked_image(self, image: Tensor, blocks: Tensor, scores: Tensor) -> Tensor:
        """The image without the masked blocks, [B, 3, H, W].

        A hard mask passes no gradient to a learnable projection. It learns by a straight-through estimate: the mask
        is hard in the forward pass, and behaves like `sigmoid((tau - score) / 0.1)` of its block in the backward pass.
        """
        block = self.masker.block
        masked = mask_image(image, blocks, block)
        if not scores.requires_grad or self.learns_from_truth:
            return masked
        below = ((self.masker.tau - scores) / SOFT_GATE_WIDTH).sigmoid()
        soft = F.adaptive_avg_pool2d(below[:, None], (blocks.shape[-2], blocks.shape[-1]))[:, 0]
        gate = spread_blocks(soft - soft.detach(), (image.shape[-2], image.shape[-1]), block)
        return masked - image * gate[:, None]

    def _with_extras(self, result: dict[str, Tensor], probe: Probe, blocks: Tensor, batch: Batch) -> dict[str, Tensor]:
        """Add what is logged. A projection that learns from the ground truth adds its gradient, but no value."""
        scores = probe.scores
        extras = {"masked_share": blocks.float().mean(), "mean_score": scores.detach().mean()}
        loss = result["loss"]
        if self.learns_from_truth:
            grounding = grounding_loss(scores, batch.target)
            loss = loss + GROUNDING_SCALE * (grounding - grounding.detach())
            extras["grounding_loss"] = grounding.detach()
        if self.diagnostics_every is not None:
            sums = alignment_sums(scores, blocks, batch.target, self.masker.block, probe.shuffled, probe.other)
            extras.update(alignment=sums, scores=scores.detach(), blocks=blocks)
        return {**result, **extras, "loss": loss}

    @property
    def learns_from_truth(self) -> bool:
        """Whether the score has a projection that learns from the ground truth."""
        return isinstance(self.scorer, GroundedScorer)

    @property
    def needs_calibration(self) -> bool:
        """Whether the temperature is still to be solved."""
        return self.masker.needs_calibration

    def setup(self, first_batches: Iterable[Batch], reduce: Reduce | None = None) -> list[str]:
        """Solve an automatic temperature on the run's first batches."""
        return describe_calibration(self.calibrate(first_batches, reduce))

    def before_step(self, step: int, batches: list[Batch], reduce: Reduce | None = None) -> list[str]:
        """Follow the curriculum and the averaged weights; solve the temperature again if the run is set to.

        The old temperature stays if none can be solved.
        """
        self.masker.set_step(step)
        if isinstance(self.scorer, PredictionScorer):
            self.scorer.follow(self.model, step)
        if not (self.calibrate_every and step and step % self.calibrate_every == 0):
            return []
        try:
            self.calibrate(batches, reduce, again=True)
        except UserError as error:
            return [f"WARNING: step {step}: AML's temperature stays as it was: {error}"]
        return []

    @torch.no_grad()
    def calibrate(
        self, batches: Iterable[Batch], reduce: Reduce | None = None, *, again: bool = False
    ) -> Calibration | None:
        """Solve the temperature under the dropout that scores are computed under; see `AlignmentMasker.calibrate`.

        None if nothing needs solving; again: solve even if solved already.
        """
        if not (again or self.needs_calibration):
            return None
        if self.level != "feature" and not self.clean_loss_weight:
            return self.masker.calibrate(self.model, batches, reduce)
        scorer = self.scorer
        if not isinstance(scorer, EarlyScorer):
            return None
        return calibrate(scorer, self._training_features(scorer, batches), reduce)

    def _training_features(self, scorer: EarlyScorer, batches: Iterable[Batch]) -> Iterator[AlignmentFeatures]:
        """Yield the features to score in training mode; restore the batch norms afterwards."""
        for batch in batches:
            buffers = [(buffer, buffer.clone()) for buffer in self.model.buffers()]
            with torch.random.fork_rng([batch.image.device.index] if batch.image.is_cuda else []):
                features = self.model.encode(batch)
                output = self.model.decode(features, batch) if self.clean_loss_weight else None
            for buffer, before in buffers:
                buffer.copy_(before)
            yield scorer.features(self.model, batch, features, output)

    def param_groups(self, lr: float, weight_decay: float) -> list[dict[str, Any]]:
        """Optimizer groups of everything this method trains: the model's own, and a trained projection's."""
        groups = super().param_groups(lr, weight_decay)
        own = [parameter for parameter in self.masker.parameters() if parameter.requires_grad]
        if own:
            groups = [*groups, {"name": "aml_projection", "params": own, "lr": lr, "weight_decay": weight_decay}]
        return groups

    def describe(self) -> dict[str, Any]:
        facts: dict[str, Any] = {"preset": self.preset}
        if self.level != "image":
            facts["level"] = self.level
        return {**facts, **self.masker.describe()}

    def recorder(self, dataset: ReferDataset, folder: Path, device: torch.device) -> AlignmentDiagnostics | None:
        """Alignment statistics and pictures of fixed samples; see `diagnostics`."""
        if self.diagnostics_every is None:
            return None
        masker = self.masker
        return build_alignment_diagnostics(
            dataset, folder, device, self.diagnostics_every, block=masker.block, tau=masker.tau
        )


@register_method(
    summary="score patches against the words, mask what does not align, train on the rest",
    paper="AMLRIS: Alignment-aware Masked Learning for Referring Image Segmentation, ICLR 2026",
    options=AMLOptions,
)
def aml(model: RISModel, loss: nn.Module, options: AMLOptions, vocabulary: Vocabulary | None) -> AML:
    """Build AML with the settings of its options."""
    settings = resolve(options)
    return AML(
        model,
        loss,
        build_alignment_masker(model, settings),
        preset=settings.preset,
        level=settings.level,
        soft=settings.loss_weights == "scores",
        clean_loss_weight=settings.clean_loss_weight,
        calibrate_every=settings.calibrate_every,
        diagnostics_every=settings.diagnostics_every,
    )
