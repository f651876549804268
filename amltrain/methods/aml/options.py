"""The complete settings of AML. `presets` fills them, `options` is what a run overrides.

Presets of AML: the paper's equations, or the behaviour of the public code (pipashu1/AMLRIS, 930e56b).

Every field of a preset can be overridden on its own; pairs that cannot work are rejected in one sentence.

What a run sets of AML: the section `aml`. Imports no torch, so that --help can show it quickly.
"""

from dataclasses import dataclass, replace
from typing import Literal

from amltrain.config.fields import FREE, Partial, key, override, partial_of
from amltrain.errors import UserError, unknown_name
from amltrain.registry import METHODS


@dataclass(frozen=True, kw_only=True)
class AMLSettings:
    """Alignment-aware masked learning (arXiv 2602.22740), with every value chosen."""

    preset: Literal["paper", "released"]
    """paper: the equations; released: what the public code does."""
    features: Literal["early", "late", "pred", "oracle"]
    """What is scored: features before fusion (early), after it (late), or the first pass's predicted mask (pred). Ours:
    the ground truth (oracle), to learn what the best score could do; never a result to publish as a method's."""
    oracle: Literal["referent_kept", "background_first", "distractors_first"] = "referent_kept"
    """Ours, with features oracle: what is masked first: anything but the referent, background before the picture's
    other referents, or those before the background."""
    projection: Literal["random", "learnable", "identity", "linear", "cosine", "grounded"]
    """How visual and text features are compared: two fixed Gaussian matrices (random), the same trained with the model
    by a straight-through gradient (learnable), none for encoders that share a space (identity), or the public code's
    one fixed linear map of the text (linear). Ours, without a softmax over tokens: for encoders that share a space, the
    cosine of a patch and its most similar word, from 0 to 1 (cosine); or the probability that two matrices give, which
    learn to tell the referent's patches from the others, detached from the model (grounded)."""
    dim: int
    """Width D that random and learnable projections project to; the paper's is 2048."""
    projection_seed: int
    """Seed of the projections' entries."""
    normalize: bool
    """L2-normalise every feature vector before it is projected."""
    score_padding: bool
    """Include padded tokens in the softmax over tokens (as the public code does)."""
    temperature: float | Literal["auto"]
    """Divides the similarities. auto: solved at the start of training so that the mean score is 0.75, then kept. 1.0 is
    the paper's literal formula, which masks whole images."""
    calibrate_every: int | None = None
    """Solve an automatic temperature again every this many steps, on the samples of that step; null = once. For
    encoders that start from random weights: as they learn, the scores move away from where they were solved."""
    tau: float
    """Score under which a pixel is weak; 0 masks nothing."""
    rho: float
    """Share of the weak pixels (selection pixel, released) or weak blocks (patch) that is selected."""
    share: float | None = None
    """Ours: mask exactly this share of every image's blocks, those of the lowest mean scores, instead of what tau, rho
    and selection give; equal scores in random order. Compares scores at one amount. null = off."""
    dynamic_tau: float = 0.0
    """Strength s, 0 to 1, of a threshold of each sample's own: tau * (1 + s * (confidence + length - 1)), where
    confidence is the first pass's mean |2p - 1| over the image's pixels and length the share of the token positions
    that the sentence fills. After the paper's appendix G.6.2, which prints no formula; the formula is ours. 0 = off."""
    block: int
    """Side of a masked block, pixels."""
    selection: Literal["pixel", "patch", "released"]
    """Which blocks are masked: any with a selected pixel (pixel), a share rho of the weak ones (patch), or those of the
    public code's indexing, which are nearly all (released)."""
    start_after: int = 0
    """Ours: steps at the start of training that mask nothing; scores are computed from the start."""
    ramp_steps: int = 0
    """Ours: steps after them over which `ramp` grows linearly from 0 to its value; 0 = at once."""
    ramp: Literal["tau", "rho"] = "tau"
    """Ours: what grows during ramp_steps."""
    score_decay: float | None = None
    """Ours, with features pred: score with an average of the model's weights over the steps, of this decay per step;
    null = with the model as it is."""
    level: Literal["image", "feature", "random", "loss"]
    """What is masked: image blocks, the decoder's view of the weak positions (feature), as many image blocks at random
    places (random), or, ours, the loss of the weak blocks' pixels, the image staying whole (loss)."""
    loss_weights: Literal["blocks", "scores", "random"] = "blocks"
    """Ours, with level loss: weak blocks count 0 and all others 1 (blocks); every pixel counts as much as its score,
    the soft masks of the paper's appendix G.3 (scores); or as many blocks at random places count 0 (random)."""
    random_shares: tuple[float, ...] = ()
    """Shares of the image's blocks that level random hides, one drawn per sample and epoch: a control whose amount does
    not depend on the trained model. Scores are computed as always, and decide nothing. Empty = as many blocks as the
    scores of the trained model select."""
    clean_loss_weight: float
    """Weight of the loss on the unmasked image, 0..1; the masked one gets the rest. Above 0 the unmasked image is
    encoded with gradient, its features are scored, and its text features serve the masked image too."""
    text: Literal["prompted", "plain"] | None = None
    """Token features that are scored, for models that offer it: conditioned on the image as the decoder sees them
    (prompted), or of the sentence alone (plain). null = the model's own choice."""
    visual: Literal["unimodal", "conditioned"] | None = None
    """Image features that are scored, for models that offer it: without words (unimodal), or as the trained network has
    them, words of earlier stages included (conditioned). null = the model's own choice."""
    stage1_size: int | None = None
    """Score a smaller copy of the image, of this side in pixels; null = the full network input."""
    cache_scores: bool = key(False, scope=FREE)
    """Remember each sentence's scores, for models whose scored encoders are frozen."""
    diagnostics_every: int | None = key(None, scope=FREE)
    """Steps between rows of alignment statistics (scores, masked share, masked referents; alignment.csv, alignment.png
    and pictures of fixed samples in the output folder, curves in the trackers); null = off."""


def of_finished_model(settings: AMLSettings) -> AMLSettings:
    """The settings as they mask at the end of a run, for a model without its training state.

    Trained projections and averaged weights are in that state alone: random projections and the model itself stand in.
    """
    projection = "random" if settings.projection in ("learnable", "grounded") else settings.projection
    return replace(settings, projection=projection, cache_scores=False, start_after=0, ramp_steps=0, score_decay=None)


PRESETS: dict[str, AMLSettings] = {
    "paper": AMLSettings(
        preset="paper",
        features="early",
        projection="random",
        dim=2048,
        projection_seed=0,
        normalize=True,
        score_padding=False,
        temperature="auto",
        tau=0.4,
        rho=0.25,
        block=32,
        selection="pixel",
        level="image",
        clean_loss_weight=0.0,
    ),
    "released": AMLSettings(
        preset="released",
        features="early",
        projection="linear",
        dim=2048,
        projection_seed=0,
        normalize=False,
        score_padding=True,
        temperature=1.0,
        tau=0.4,
        rho=0.25,
        block=32,
        selection="released",
        level="image",
        clean_loss_weight=0.5,
    ),
}


def resolve(options: Partial) -> AMLSettings:
    """The preset, with every field that the run sets itself (AMLOptions).

    Raises UserError for values that cannot work together.
    """
    preset = options.preset or "paper"
    if preset not in PRESETS:
        raise unknown_name("aml.preset", preset, PRESETS)
    chosen = override(PRESETS[preset], options)
    check_ranges(chosen)
    check_pairs(chosen)
    return chosen


def check_ranges(config: AMLSettings) -> None:
    """Raise UserError for a number outside its range."""
    for name in ("tau", "rho", "clean_loss_weight", "share", "dynamic_tau"):
        value = getattr(config, name)
        if value is not None and not 0 <= value <= 1:
            raise UserError(f"aml.{name}={value} must lie between 0 and 1")
    for name in ("dim", "block", "stage1_size", "diagnostics_every", "calibrate_every"):
        value = getattr(config, name)
        if value is not None and value < 1:
            raise UserError(f"aml.{name}={value} must be at least 1")
    for name in ("start_after", "ramp_steps"):
        if getattr(config, name) < 0:
            raise UserError(f"aml.{name}={getattr(config, name)} must be at least 0")
    if config.score_decay is not None and not 0 <= config.score_decay < 1:
        raise UserError(f"aml.score_decay={config.score_decay} must be at least 0 and below 1")
    for share in config.random_shares:
        if not 0 <= share <= 1:
            raise UserError(f"aml.random_shares: {share:g} is not a share of the image, 0 to 1")
    if config.temperature != "auto" and not float(config.temperature) > 0:
        raise UserError(f"aml.temperature={config.temperature} must be positive, or `auto`")
    if config.clean_loss_weight == 1.0:
        raise UserError("aml.clean_loss_weight=1 never trains on a masked image; use --method supervised")


def check_pairs(config: AMLSettings) -> None:
    """Raise UserError for two values that contradict each other."""
    if config.projection == "grounded" and config.features in ("pred", "oracle"):
        raise UserError(
            f"aml.projection=grounded has nothing to learn where aml.features={config.features} projects nothing"
        )
    if config.score_decay is not None and config.features != "pred":
        raise UserError(f"aml.score_decay belongs to aml.features=pred, not {config.features}")
    if config.projection == "learnable":
        if config.start_after or config.ramp_steps:
            raise UserError(
                "aml.projection=learnable learns through the masked pixels from the first step: set aml.start_after=0 "
                "and aml.ramp_steps=0, or use aml.projection=grounded"
            )
        if config.level != "image":
            raise UserError(
                f"aml.projection=learnable learns through the masked pixels, and aml.level={config.level} gives it "
                "none; use aml.level=image"
            )
        if config.features in ("pred", "oracle"):
            raise UserError(
                f"aml.projection=learnable has nothing to learn where aml.features={config.features} projects nothing"
            )
    if config.calibrate_every is not None and (config.temperature != "auto" or config.cache_scores):
        raise UserError(
            "aml.calibrate_every solves the temperature repeatedly: set aml.temperature=auto and aml.cache_scores=false"
        )
    if config.random_shares and config.level != "random":
        raise UserError(f"aml.random_shares belongs to aml.level=random, not {config.level}")
    if config.level in ("feature", "loss") and config.clean_loss_weight:
        raise UserError(
            f"aml.level={config.level} leaves the image whole, so it has no second loss: set aml.clean_loss_weight=0"
        )
    if config.loss_weights != "blocks" and config.level != "loss":
        raise UserError(f"aml.loss_weights belongs to aml.level=loss, not {config.level}")
    if config.loss_weights == "scores" and config.share is not None:
        raise UserError("aml.loss_weights=scores leaves no block out, so aml.share has no effect; remove one of them")
    if config.oracle != "referent_kept" and config.features != "oracle":
        raise UserError(f"aml.oracle belongs to aml.features=oracle, not {config.features}")
    if config.share is not None and (config.random_shares or config.dynamic_tau):
        raise UserError("aml.share fixes what is masked; remove aml.random_shares and aml.dynamic_tau")
    if config.dynamic_tau and config.features == "oracle":
        raise UserError("aml.dynamic_tau moves the threshold by a prediction, which aml.features=oracle does not make")
    if config.stage1_size is not None and (config.clean_loss_weight or config.level == "feature"):
        raise UserError(
            "aml.stage1_size saves nothing where the full-size image is encoded with gradient anyway "
            "(aml.clean_loss_weight above 0, aml.level=feature)"
        )
    if config.cache_scores and (config.features != "early" or config.clean_loss_weight or config.level == "feature"):
        raise UserError(
            "aml.cache_scores skips stage 1, which needs aml.features=early, aml.clean_loss_weight=0 and an aml.level "
            "other than feature"
        )
    if config.cache_scores and config.projection in ("learnable", "grounded"):
        raise UserError(
            f"aml.cache_scores needs scores that stay the same; aml.projection={config.projection} changes them"
        )


@partial_of(AMLSettings)
class AMLOptions(Partial):
    """Alignment-aware masked learning (arXiv 2602.22740). null = the preset's value; the default preset is paper."""

    @staticmethod
    def presets() -> dict[str, AMLSettings]:
        """Return the complete settings that `preset` stands for, by name."""
        return PRESETS

    def complete(self) -> AMLSettings:
        """Return the preset with what the run sets itself. Raises UserError for values that cannot work."""
        return resolve(self)

    def check(self) -> None:
        """Raise UserError for values that cannot work, alone or together."""
        resolve(self)


METHODS.add_options("aml", AMLOptions)
