"""AML's masker: score the unmasked image (stage 1), then decide which blocks to hide (AFM).

Stage 1 runs in evaluation mode: scores are a function of image, sentence and weights, batch norms keep their
statistics, and no random number is drawn, so dropout in stage 2 is what the baseline would draw.

Alignment scores and masks of a trained model, for reports and demos: what AML's own masker gives.

A model folder holds no temperature, so it is solved on the first samples, as a training run solves it on its first
batches.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from amltrain.errors import UserError
from amltrain.methods.aml.masking import (
    Curriculum,
    Selection,
    filtering_mask,
    lowest_blocks,
    random_blocks,
    relocate,
)
from amltrain.methods.aml.options import AMLOptions, AMLSettings, of_finished_model, resolve
from amltrain.methods.aml.scorers import (
    DirectScorer,
    EarlyScorer,
    GroundedProjection,
    GroundedScorer,
    LateScorer,
    OracleScorer,
    PredictionScorer,
    ScoreCache,
    Scorer,
    calibrate,
    confidence,
    reject_sharded,
    shrunk,
)
from amltrain.methods.aml.similarity import (
    Calibration,
    CosineSimilarity,
    check_widths,
    create_projection,
    warn_if_literal,
)
from amltrain.methods.base import Masker, Masking, Reduce, register_masker
from amltrain.models.base import RISModel
from amltrain.records import AlignmentFeatures, Batch, Features, ModelOutput


class Probe(NamedTuple):
    """Scores [B, h, w] of a batch, and what they are compared with to tell what they know; None where that costs
    another pass of the model. shuffled: with the next sample's sentence. other: of projections of another seed.
    """

    scores: Tensor
    shuffled: Tensor | None = None
    other: Tensor | None = None


class AlignmentMasker(Masker):
    """Hide image blocks with low alignment scores."""

    random_shares: Tensor
    now: Tensor

    def __init__(
        self,
        scorer: Scorer,
        *,
        tau: float = 0.4,
        rho: float = 0.25,
        block: int = 32,
        selection: Selection = "pixel",
        relocated: bool = False,
        random_shares: Sequence[float] = (),
        stage1_size: int | None = None,
        cache_scores: bool = False,
        curriculum: Curriculum | None = None,
        other_projection: nn.Module | None = None,
        share: float | None = None,
        dynamic_tau: float = 0.0,
    ) -> None:
        """relocated: hide as many blocks at random places (the control). random_shares: hide one of these shares of the
        blocks instead, whatever the scores. share, dynamic_tau: see AMLSettings. stage1_size: score a smaller copy of
        the image. cache_scores: remember scores; only for a model whose scored encoders never change. other_projection:
        what `probe` compares with.
        """
        super().__init__()
        self.scorer = scorer
        self.tau, self.rho, self.block, self.selection = tau, rho, block, selection
        self.relocated, self.share, self.dynamic_tau = relocated, share, dynamic_tau
        self.needs_regions = isinstance(scorer, OracleScorer)
        self.register_buffer("random_shares", torch.tensor(random_shares, dtype=torch.float32), persistent=False)
        self.stage1_size = stage1_size
        self.cache = ScoreCache() if cache_scores else None
        self.curriculum = curriculum or Curriculum()
        self.register_buffer("now", torch.tensor([tau, rho, 1.0]), persistent=False)
        self.set_step(0)
        self._other_projection = [] if other_projection is None else [other_projection]  # not in the training state

    def set_step(self, step: int) -> None:
        """Set tau, rho and the random control's factor to what the curriculum gives optimizer step `step`."""
        if not self.curriculum.changes:
            return
        factor = self.curriculum.factor(step)
        for index, (name, value) in enumerate((("tau", self.tau), ("rho", self.rho))):
            self.now[index] = value * factor if self.curriculum.ramp == name else value
        self.now[2] = factor

    def forward(
        self, model: RISModel, batch: Batch, features: Features | None = None, output: ModelOutput | None = None
    ) -> Masking:
        scores = self.scores(model, batch, features, output)
        return Masking(self.blocks(scores, batch, self.factors(model, batch, features, output)), scores)

    def factors(
        self, model: RISModel, batch: Batch, features: Features | None = None, output: ModelOutput | None = None
    ) -> Tensor | None:
        """What multiplies every sample's tau, [B, 1, 1]; None without `aml.dynamic_tau`."""
        if not self.dynamic_tau:
            return None
        known = confidence(model, shrunk(batch, self.stage1_size), features, output)
        length = batch.text_mask.float().mean(1)
        return (1 + self.dynamic_tau * (known + length - 1))[:, None, None]

    def scores(
        self, model: RISModel, batch: Batch, features: Features | None = None, output: ModelOutput | None = None
    ) -> Tensor:
        """Stage 1: alignment scores [B, h, w] float32; without gradient except with a learnable projection."""
        if self.cache is None or features is not None:
            return self.score(model, batch, features, output)
        if not self.cache.known:
            reject_sharded(model)
        return self.cache(batch, lambda missing: self.score(model, missing))

    def score(
        self, model: RISModel, batch: Batch, features: Features | None = None, output: ModelOutput | None = None
    ) -> Tensor:
        """Compute `scores` without the cache."""
        return self.scorer(model, shrunk(batch, self.stage1_size), features, output)

    def probe(
        self, model: RISModel, batch: Batch, features: Features | None = None, output: ModelOutput | None = None
    ) -> Probe:
        """`scores`, and what the same features score with other sentences and with other projections."""
        scorer = self.scorer
        if self.cache is not None or isinstance(scorer, PredictionScorer | OracleScorer):
            return Probe(self.scores(model, batch, features, output))
        found = scorer.features(model, shrunk(batch, self.stage1_size), features, output)
        scores = scorer.score(found)
        with torch.no_grad():
            shuffled = None if scorer.fused or len(found.text) == 1 else scorer.score(with_next_sentence(found))
            other = None
            if self._other_projection and isinstance(scorer, EarlyScorer):
                projection = self._other_projection[0].to(found.visual.device)
                other = scorer.score(found, projection)
        return Probe(scores, shuffled, other)

    def blocks(self, scores: Tensor, batch: Batch, factors: Tensor | None = None) -> Tensor:
        """AFM's decision [B, r, c] bool, True = hide this block. factors: of `factors`."""
        size = (batch.image.shape[-2], batch.image.shape[-1])
        grid = (-(-size[0] // self.block), -(-size[1] // self.block))
        if self.share is not None:
            blocks = lowest_blocks(scores.detach(), grid, self.share, batch.random_key)
            return relocate(blocks, batch.random_key) if self.relocated else blocks
        if len(self.random_shares):
            shares = self.random_shares * self.now[2] if self.curriculum.changes else self.random_shares
            return random_blocks(grid, shares, batch.random_key)
        tau, rho = (self.now[0], self.now[1]) if self.curriculum.changes else (self.tau, self.rho)
        blocks = filtering_mask(
            scores.detach(),
            size,
            batch.random_key,
            tau=tau if factors is None else tau * factors,
            rho=rho,
            block=self.block,
            selection=self.selection,
        )
        return relocate(blocks, batch.random_key) if self.relocated else blocks

    @property
    def needs_calibration(self) -> bool:
        """Whether the temperature is still to be solved (reads a buffer: once per run, not per step)."""
        return not bool(self.scorer.calibrated)

    @torch.no_grad()
    def calibrate(self, model: RISModel, batches: Iterable[Batch], reduce: Reduce | None = None) -> Calibration | None:
        """Solve the temperature on batches, at least one, different ones on every process; None: there is none.

        Raises UserError if no temperature gives the wanted mean score. Call it before the method is wrapped for FSDP or
        ZeRO-3, which hide weights outside forward.
        """
        if not isinstance(self.scorer, EarlyScorer):
            return None
        scored = (self.scorer.features(model, shrunk(batch, self.stage1_size)) for batch in batches)
        return calibrate(self.scorer, scored, reduce)

    def setup(self, model: RISModel, batches: Iterable[Batch], reduce: Reduce | None = None) -> list[str]:
        return describe_calibration(self.calibrate(model, batches, reduce)) if self.needs_calibration else []

    def describe(self) -> dict[str, Any]:
        if self.share is not None:
            facts: dict[str, Any] = {"share": self.share}
            return facts | ({"oracle": self.scorer.order} if isinstance(self.scorer, OracleScorer) else {})
        if not isinstance(self.scorer, EarlyScorer):
            return {"tau": self.tau, "rho": self.rho}
        return {"tau": self.tau, "rho": self.rho, "temperature": float(self.scorer.temperature)}


def with_next_sentence(features: AlignmentFeatures) -> AlignmentFeatures:
    """Every image with the token features of the batch's next sample."""
    return features._replace(text=features.text.roll(-1, 0), text_mask=features.text_mask.roll(-1, 0))


def describe_calibration(calibration: Calibration | None) -> list[str]:
    """Lines to log about a solved temperature."""
    if calibration is None:
        return []
    return [f"AML temperature {calibration.temperature:.4g}: mean score {calibration.mean_score:.3f}"]


def build_scorer(model: RISModel, settings: AMLSettings) -> Scorer:
    """Build the scorer that the settings name, at the width of this model's features."""
    if settings.features == "oracle":
        return OracleScorer(settings.oracle, settings.block)
    if settings.features == "pred":
        return PredictionScorer(model, settings.score_decay)
    widths = model.alignment_dims if settings.features == "early" else model.fused_dims
    if widths is None:
        raise _cannot(model, "features=late", "features after fusion, which {} does not give; use early or pred")
    kind = EarlyScorer if settings.features == "early" else LateScorer
    source = partial(kind, nn.Identity(), text=settings.text, visual=settings.visual)
    if settings.projection == "cosine":
        check_widths("cosine", *widths)
        return DirectScorer(CosineSimilarity(), source())
    if settings.projection == "grounded":
        grounded = GroundedProjection(*widths, dim=settings.dim, seed=settings.projection_seed)
        return GroundedScorer(grounded, source())
    temperature = None if settings.temperature == "auto" else float(settings.temperature)
    if temperature is not None:
        warn_if_literal(temperature, settings.normalize)
    projection = create_projection(
        settings.projection,
        *widths,
        dim=settings.dim,
        seed=settings.projection_seed,
    )
    return kind(
        projection,
        text=settings.text,
        visual=settings.visual,
        temperature=temperature,
        normalize=settings.normalize,
        score_padding=settings.score_padding,
    )


def build_alignment_masker(model: RISModel, settings: AMLSettings) -> AlignmentMasker:
    """AML's masker for a model. Raises UserError for settings that this model cannot have."""
    check_model(model, settings)
    scorer = build_scorer(model, settings)
    other = None
    if settings.diagnostics_every is not None and settings.projection == "random":
        second = build_scorer(model, replace(settings, projection_seed=settings.projection_seed + 1))
        other = second.projection if isinstance(second, EarlyScorer) else None
    return AlignmentMasker(
        scorer,
        tau=settings.tau,
        rho=settings.rho,
        block=settings.block,
        selection=settings.selection,
        relocated=settings.level == "random" or settings.loss_weights == "random",
        random_shares=settings.random_shares,
        stage1_size=settings.stage1_size,
        cache_scores=settings.cache_scores,
        curriculum=Curriculum(settings.start_after, settings.ramp_steps, settings.ramp),
        other_projection=other,
        share=settings.share,
        dynamic_tau=settings.dynamic_tau,
    )


@register_masker("aml", options=AMLOptions)
def alignment_masker(model: RISModel, options: AMLOptions) -> AlignmentMasker:
    """AML's masker for another method. Raises UserError for options that only AML itself can use."""
    settings = resolve(options)
    trained = settings.projection in ("learnable", "grounded")
    follows = settings.score_decay is not None or settings.start_after or settings.ramp_steps
    if settings.level in ("feature", "loss") or settings.clean_loss_weight or trained or follows:
        raise UserError(
            "a masker hides blocks of the image; level: feature and loss, clean_loss_weight, projection: learnable and "
            "grounded, score_decay, start_after and ramp_steps belong to method aml: leave them out"
        )
    return build_alignment_masker(model, settings)


@dataclass
class OracleMaskerOptions:
    """Blocks by the ground truth: what a perfect score could do, as a control for a method that hides blocks."""

    order: Literal["referent_kept", "background_first", "distractors_first"] = "referent_kept"
    """What is hidden first; see `aml.oracle`."""
    share: float = 0.2
    """Share of every image's blocks that is hidden."""
    block: int = 32
    """Side of a block, pixels."""


@register_masker("oracle", options=OracleMaskerOptions)
def oracle_masker(model: RISModel, options: OracleMaskerOptions) -> AlignmentMasker:
    """Build a masker that knows the ground truth. Raises UserError."""
    settings = AMLOptions(features="oracle", oracle=options.order, share=options.share, block=options.block)
    return build_alignment_masker(model, resolve(settings))


def check_model(model: RISModel, settings: AMLSettings) -> None:
    """Raise UserError for settings that this model does not have."""
    if settings.features == "late" and model.fused_dims is None:
        raise _cannot(model, "features=late", "features after fusion, which {} does not give; use early or pred")
    if settings.level == "feature" and not model.supports_suppression:
        raise _cannot(model, "level=feature", "attention over visual positions, which {} does not have; use image")
    if settings.cache_scores and not model.alignment_is_frozen:
        raise _cannot(model, "cache_scores", "frozen encoders, and {} trains what is scored; set it to false")
    for key, value, offered in (
        ("text", settings.text, model.alignment_texts),
        ("visual", settings.visual, model.alignment_visuals),
    ):
        if value is not None and value not in offered:
            has = f"offers {', '.join(offered)}" if offered else "has one kind only"
            raise UserError(f"aml.{key}={value}: {type(model).__name__} {has}; remove aml.{key}")


def _cannot(model: RISModel, option: str, reason: str) -> UserError:
    return UserError(f"aml.{option} needs {reason.format(type(model).__name__)}")


class Aligner:
    """Scores images against sentences and masks them as AML does in training.

    settings   complete settings of the run, or the paper's
    trained    whether the model was trained with AML, so that its masks are like those of its training
    """

    def __init__(self, model: RISModel, options: AMLOptions | None = None, trained: bool = False) -> None:
        """options: of the run; None = the paper's. Raises UserError for options that the model cannot have."""
        settings = of_finished_model(resolve(options or AMLOptions()))
        self.model, self.settings, self.trained = model, settings, trained
        self.masker = build_alignment_masker(model, settings).to(next(model.parameters()).device)

    @property
    def tau(self) -> float:
        return self.settings.tau

    @property
    def temperature(self) -> float | None:
        """The temperature in use; None where the score is a predicted mask."""
        return self.masker.describe().get("temperature")

    def calibrate(self, batches: Sequence[Batch], *, again: bool = False) -> None:
        """Solve an automatic temperature on batches on the model's device. Raises UserError if none fits.

        again: also if it was solved before.
        """
        if self.masker.needs_calibration or (again and self.settings.temperature == "auto"):
            self.masker.calibrate(self.model, batches)

    @torch.no_grad()
    def __call__(self, batch: Batch) -> Masking:
        """Score a batch on the model's device. An automatic temperature is solved on it if it was not before."""
        self.calibrate([batch])
        return self.masker(self.model, batch)


def build_aligner(model: RISModel, training: Mapping[str, Any] | None) -> Aligner | None:
    """Build an aligner with the settings of the run that trained the model; None where its features cannot be scored.

    training: the content of the model folder's training.json, or None.
    """
    recipe = (training or {}).get("recipe", {})
    section = recipe.get("aml") or {}
    trained = recipe.get("method") == "aml" or bool(section.get("enabled"))  # the key of version 0.1
    known = {option.name for option in fields(AMLOptions)}
    given = {name: value for name, value in section.items() if name in known}
    if given.get("features") == "oracle":  # it scores by annotations, which a photograph does not have
        return None
    try:
        return Aligner(model, AMLOptions(**given), trained)
    except (AttributeError, UserError):
        return None
