"""The complete settings of AML. `presets` fills them, `options` is what a run overrides."""

from dataclasses import dataclass, field, replace
from typing import Literal

from amltrain.config.schema import FREE_TO_CHANGE


@dataclass(frozen=True, kw_only=True)
class AMLSettings:
    """Alignment-aware masked learning (arXiv 2602.22740), with every value chosen."""

    preset: Literal["paper", "released"]
    """paper: the equations; released: what the public code does."""
    features: Literal["early", "late", "pred"]
    """What is scored: features before fusion (early), after it (late), or the first pass's predicted mask (pred)."""
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
    explicit: bool
    """Build the two random projections instead of their collapsed form: the same scores, more work."""
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
    level: Literal["image", "feature", "random"]
    """What is masked: image blocks, the decoder's view of the weak positions (feature), or as many image blocks at
    random places (random)."""
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
    cache_scores: bool = field(default=False, metadata=FREE_TO_CHANGE)
    """Remember each sentence's scores, for models whose scored encoders are frozen."""
    diagnostics_every: int | None = field(default=None, metadata=FREE_TO_CHANGE)
    """Steps between rows of alignment statistics (scores, masked share, masked referents; alignment.csv, alignment.png
    and pictures of fixed samples in the output folder, curves in the trackers); null = off."""


def of_finished_model(settings: AMLSettings) -> AMLSettings:
    """The settings as they mask at the end of a run, for a model without its training state.

    Trained projections and averaged weights are in that state alone: random projections and the model itself stand in.
    """
    projection = "random" if settings.projection in ("learnable", "grounded") else settings.projection
    return replace(settings, projection=projection, cache_scores=False, start_after=0, ramp_steps=0, score_decay=None)
