"""Model + loss (+ AML) in one nn.Module, so that Accelerate's engines see one forward and one backward per batch.

Stage 1 of AML scores the original image without gradient; stage 2 trains the same model on the masked image.

Stage 1 runs in evaluation mode: scores are then a function of image, sentence and weights, batch norms keep their
statistics, and no random number is drawn, so dropout in stage 2 is what the baseline would draw. Where the unmasked
image is encoded with gradient anyway (`clean_loss_weight` above 0, `level: feature`), those training-mode features are
scored instead of paying for another pass, as the public code does.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from amltrain.config.schema import AMLConfig
from amltrain.errors import UserError
from amltrain.losses import check_channels
from amltrain.methods.aml.cache import ScoreCache, refuse_sharded
from amltrain.methods.aml.masking import Selection, filtering_mask, mask_image, relocate, spread_blocks
from amltrain.methods.aml.presets import resolve
from amltrain.methods.aml.similarity import PatchScorer, create_projection
from amltrain.methods.aml.statistics import alignment_sums
from amltrain.methods.aml.temperature import Calibration, Reduce, solve_temperature, warn_if_literal
from amltrain.models.base import RISModel
from amltrain.records import AlignmentFeatures, Batch, Features, ModelOutput

FeatureStage = Literal["early", "late", "pred"]
Level = Literal["image", "feature", "random"]
SOFT_GATE_WIDTH = 0.1  # of the straight-through gradient: scores this far from tau still learn


class SupervisedTask(nn.Module):
    """The plain baseline: `loss(model(batch), batch)`."""

    needs_calibration = False

    def __init__(self, model: RISModel, loss: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.loss = loss

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """A dict with "loss" (scalar) and detached parts of it."""
        return self.loss(self.model(batch), batch)

    def param_groups(self, lr: float, weight_decay: float) -> list[dict[str, Any]]:
        """Optimizer groups of everything this task trains."""
        return self.model.param_groups(lr, weight_decay)


class AMLTask(nn.Module):
    """Alignment-aware masked learning around any registered model.

    forward(batch) returns "loss" [] and, detached: the loss's own parts (prefixed `clean_` for the unmasked image),
    "masked_share" [] of the blocks and "mean_score" [] of the patches. Nothing waits for the device.
    """

    def __init__(
        self,
        model: RISModel,
        loss: nn.Module,
        scorer: PatchScorer | None,
        *,
        features: FeatureStage = "early",
        tau: float = 0.4,
        rho: float = 0.25,
        block: int = 32,
        selection: Selection = "pixel",
        level: Level = "image",
        clean_loss_weight: float = 0.0,
        stage1_size: int | None = None,
        cache_scores: bool = False,
        diagnostics: bool = False,
    ) -> None:
        """scorer: PMME; None with features="pred", whose score is the predicted probability of the referent.

        cache_scores: remember scores; only for a model whose scored encoders never change.
        diagnostics: also return "scores" [B, h, w], "blocks" [B, r, c] and "alignment", the sums of aml.statistics.
        """
        super().__init__()
        self.model = model
        self.loss = loss
        self.scorer = scorer
        self.features = features
        self.tau, self.rho, self.block, self.selection = tau, rho, block, selection
        self.level = level
        self.clean_loss_weight = clean_loss_weight
        self.stage1_size = stage1_size
        self.cache = ScoreCache() if cache_scores else None
        self.diagnostics = diagnostics

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """One training step's loss; see the class."""
        if self.level == "feature":
            return self._suppress_features(batch)
        if self.clean_loss_weight:
            return self._train_on_both(batch)
        scores = self.score(batch) if self.cache is None else self._cached_scores(batch)
        blocks = self.blocks(scores, batch)
        masked = batch._replace(image=self.masked_image(batch.image, blocks, scores))
        return {**self.loss(self.model(masked), masked), **self._extras(scores, blocks, batch)}

    def _train_on_both(self, batch: Batch) -> dict[str, Tensor]:
        """Both losses over one shared pass over the unmasked image, whose text features serve the masked one too."""
        features = self.model.encode(batch)
        output = self.model.decode(features, batch)
        scores = self.score(batch, features, output)
        blocks = self.blocks(scores, batch)
        masked = batch._replace(image=self.masked_image(batch.image, blocks, scores))
        clean = self.loss(output, batch)
        result = self.loss(self.model.decode(self.model.reencode_image(masked, features), masked), masked)
        total = self.clean_loss_weight * clean["loss"] + (1 - self.clean_loss_weight) * result["loss"]
        parts = {f"clean_{name}": value.detach() for name, value in clean.items()}
        masked_loss = {"masked_loss": result["loss"].detach()}
        return {**result, **parts, **masked_loss, **self._extras(scores, blocks, batch), "loss": total}

    def _suppress_features(self, batch: Batch) -> dict[str, Tensor]:
        """Hide the weak positions from the decoder's attention; the image stays whole, so one encoding serves both."""
        features = self.model.encode(batch)
        scores = self.score(batch, features)
        blocks = self.blocks(scores, batch)
        size = features.visual[-1].shape[-2:]
        suppressed = F.interpolate(blocks[:, None].float(), size)[:, 0] > 0.5
        output = self.model.decode(features._replace(suppressed=suppressed), batch)
        return {**self.loss(output, batch), **self._extras(scores, blocks, batch)}

    def score(self, batch: Batch, features: Features | None = None, output: ModelOutput | None = None) -> Tensor:
        """Stage 1: alignment scores [B, h, w] float32 of a batch; without gradient but for a learnable projection.

        features, output: of the unmasked image, where the caller has them already (in training mode).
        """
        if self.scorer is None:
            return self._stage1(batch, features, output)
        return self.scorer(self._stage1(batch, features, output))

    def _cached_scores(self, batch: Batch) -> Tensor:
        if not self.cache.known:
            refuse_sharded(self.model)
        return self.cache(batch, self.score)

    def _stage1(self, batch: Batch, features: Features | None = None, output: ModelOutput | None = None) -> Any:
        """What is scored: AlignmentFeatures; with features="pred" the score itself [B, h, w]."""
        device = batch.image.device.type
        uncached = torch.autocast(device, dtype=torch.get_autocast_dtype(device), cache_enabled=False)
        # a half-precision copy of a weight made without gradient must not be found again in stage 2
        with torch.no_grad(), evaluating(self.model), uncached if torch.is_autocast_enabled(device) else nullcontext():
            if self.stage1_size is not None:
                size = (self.stage1_size, self.stage1_size)
                smaller = F.interpolate(batch.image, size, mode="bilinear", align_corners=False, antialias=True)
                batch = batch._replace(image=smaller)
            if self.features == "early":
                scored = self.model.alignment_features(batch, features)
                return AlignmentFeatures(*(part.detach() for part in scored))  # given features carry gradient
            if output is None:
                output = self.model.decode(self.model.encode(batch) if features is None else features, batch)
            if self.features == "late":
                visual, text = output.aux["fused_visual"].detach(), output.aux["fused_text"].detach()
                return AlignmentFeatures(visual, text, batch.text_mask)
            logits = output.logits.detach().float()
            return logits.softmax(1)[:, 1] if logits.shape[1] == 2 else logits.sigmoid()[:, 0]

    def blocks(self, scores: Tensor, batch: Batch) -> Tensor:
        """AFM's decision [B, r, c] bool, True = mask this block."""
        size = (batch.image.shape[-2], batch.image.shape[-1])
        blocks = filtering_mask(
            scores.detach(),
            size,
            batch.random_key,
            tau=self.tau,
            rho=self.rho,
            block=self.block,
            selection=self.selection,
        )
        return relocate(blocks, batch.random_key) if self.level == "random" else blocks

    def masked_image(self, image: Tensor, blocks: Tensor, scores: Tensor) -> Tensor:
        """The image without the masked blocks, [B, 3, H, W].

        A hard mask passes no gradient to a learnable projection. It learns by a straight-through estimate: the mask
        is hard in the forward pass, and behaves like `sigmoid((tau - score) / 0.1)` of its block in the backward pass.
        """
        masked = mask_image(image, blocks, self.block)
        if not scores.requires_grad:
            return masked
        soft = F.adaptive_avg_pool2d(((self.tau - scores) / SOFT_GATE_WIDTH).sigmoid()[:, None], blocks.shape[-2:])[
            :, 0
        ]
        gate = spread_blocks(soft - soft.detach(), (image.shape[-2], image.shape[-1]), self.block)
        return masked - image * gate[:, None]

    def _extras(self, scores: Tensor, blocks: Tensor, batch: Batch) -> dict[str, Tensor]:
        extras = {"masked_share": blocks.float().mean(), "mean_score": scores.detach().mean()}
        if self.diagnostics:
            sums = alignment_sums(scores, blocks, batch.target, self.block)
            extras.update(alignment=sums, scores=scores.detach(), blocks=blocks)
        return extras

    @property
    def needs_calibration(self) -> bool:
        """Whether the temperature is still to be solved (reads a buffer: once per run, not per step)."""
        return self.scorer is not None and not bool(self.scorer.calibrated)

    @torch.no_grad()
    def calibrate(
        self, batches: Iterable[Batch], reduce: Reduce | None = None, *, again: bool = False
    ) -> Calibration | None:
        """Solve the temperature on batches of a run, by default its first; None when there is nothing (left) to solve.

        batches: on the model's device, at least one, different ones on every rank. again: solve what is solved already.
        reduce: sums or averages a tensor over the ranks (`accelerator.reduce`); every rank calls this function.
        Call it before the task is wrapped for FSDP or ZeRO-3, which hide weights outside forward.
        """
        if self.scorer is None or not (again or self.needs_calibration):
            return None
        scored = []
        for batch in batches:
            features = self._calibration_features(batch)
            scored.append((self.scorer.logits(features), self.scorer.token_mask(features)))
        if not scored:
            raise UserError("aml.temperature=auto needs at least one batch to be solved on; there was none")
        calibration = solve_temperature(scored, reduce=reduce)
        self.scorer.temperature.fill_(calibration.temperature)
        self.scorer.calibrated.fill_(True)
        return calibration

    def _calibration_features(self, batch: Batch) -> Any:
        """What is scored, under the dropout that it will be scored under; batch norms forget that they saw it."""
        if self.level != "feature" and not self.clean_loss_weight:
            return self._stage1(batch)
        buffers = [(buffer, buffer.clone()) for buffer in self.model.buffers()]
        with torch.random.fork_rng([batch.image.device.index] if batch.image.is_cuda else []):
            features = self.model.encode(batch)
            output = self.model.decode(features, batch) if self.clean_loss_weight else None
        for buffer, before in buffers:
            buffer.copy_(before)
        return self._stage1(batch, features, output)

    def param_groups(self, lr: float, weight_decay: float) -> list[dict[str, Any]]:
        """Optimizer groups of everything this task trains: the model's own, and a learnable projection's."""
        groups = self.model.param_groups(lr, weight_decay)
        own = [] if self.scorer is None else list(self.scorer.parameters())
        if own:
            groups = [*groups, {"name": "aml_projection", "params": own, "lr": lr, "weight_decay": weight_decay}]
        return groups


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode; afterwards exactly the modules that were training train again."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def build_task(model: RISModel, loss: nn.Module, aml: AMLConfig) -> SupervisedTask | AMLTask:
    """The training task that a run's `aml` section asks for. Raises UserError for what this model cannot do."""
    check_channels(loss, type(model).__name__, model.mask_channels)
    if not aml.enabled:
        return SupervisedTask(model, loss)
    chosen = resolve(aml)
    check_model(model, chosen)
    return AMLTask(
        model,
        loss,
        build_scorer(model, chosen),
        features=chosen.features,
        tau=chosen.tau,
        rho=chosen.rho,
        block=chosen.block,
        selection=chosen.selection,
        level=chosen.level,
        clean_loss_weight=chosen.clean_loss_weight,
        stage1_size=chosen.stage1_size,
        cache_scores=chosen.cache_scores,
        diagnostics=chosen.diagnostics_every is not None,
    )


def build_scorer(model: RISModel, chosen: AMLConfig) -> PatchScorer | None:
    """PMME for this model's features and a resolved config; None where the predicted mask is the score."""
    if chosen.features == "pred":
        return None
    visual_dim, text_dim = model.alignment_dims if chosen.features == "early" else model.fused_dims
    temperature = None if chosen.temperature == "auto" else float(chosen.temperature)
    if temperature is not None:
        warn_if_literal(temperature, chosen.normalize)
    projection = create_projection(
        chosen.projection,
        visual_dim,
        text_dim,
        dim=chosen.dim,
        seed=chosen.projection_seed,
        explicit=chosen.explicit,
    )
    return PatchScorer(
        projection, temperature=temperature, normalize=chosen.normalize, score_padding=chosen.score_padding
    )


def check_model(model: RISModel, chosen: AMLConfig) -> None:
    """Refuse options that this model does not have, and set the text that it scores."""
    name = type(model).__name__
    if chosen.features == "late" and model.fused_dims is None:
        raise UserError(f"aml.features=late needs features after fusion, which {name} does not give; use early or pred")
    if chosen.level == "feature" and not model.supports_suppression:
        raise UserError(
            f"aml.level=feature needs attention over visual positions, which {name} does not have; use image"
        )
    if chosen.cache_scores and not model.alignment_is_frozen:
        raise UserError(f"aml.cache_scores needs frozen encoders, and {name} trains what is scored; set it to false")
    if chosen.text is not None:
        if not hasattr(model, "alignment_text"):
            raise UserError(f"aml.text={chosen.text}: {name} has one kind of token features only; remove aml.text")
        model.alignment_text = chosen.text
