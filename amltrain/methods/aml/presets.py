"""Presets of AML: the paper's equations, or the behaviour of the public code (pipashu1/AMLRIS, 930e56b).

Every field of a preset can be overridden on its own; pairs that cannot work are refused in one sentence.
"""

from amltrain.config.partial import Partial, override
from amltrain.errors import UserError, unknown_name
from amltrain.methods.aml.settings import AMLSettings

PRESETS: dict[str, AMLSettings] = {
    "paper": AMLSettings(
        preset="paper",
        features="early",
        projection="random",
        dim=2048,
        projection_seed=0,
        explicit=False,
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
        explicit=False,
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
    for name, low, high in (("tau", 0.0, 1.0), ("rho", 0.0, 1.0), ("clean_loss_weight", 0.0, 1.0)):
        if not low <= getattr(config, name) <= high:
            raise UserError(f"aml.{name}={getattr(config, name)} must lie between {low:g} and {high:g}")
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
    if config.projection == "grounded" and config.features == "pred":
        raise UserError("aml.projection=grounded has nothing to learn where aml.features=pred projects nothing")
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
        if config.features == "pred":
            raise UserError("aml.projection=learnable has nothing to learn where aml.features=pred projects nothing")
    if config.calibrate_every is not None and (config.temperature != "auto" or config.cache_scores):
        raise UserError(
            "aml.calibrate_every solves the temperature repeatedly: set aml.temperature=auto and aml.cache_scores=false"
        )
    if config.random_shares and config.level != "random":
        raise UserError(f"aml.random_shares belongs to aml.level=random, not {config.level}")
    if config.explicit and config.projection != "random":
        raise UserError(f"aml.explicit belongs to aml.projection=random, not {config.projection}")
    if config.level == "feature" and config.clean_loss_weight:
        raise UserError(
            "aml.level=feature leaves the image whole, so it has no second loss: set aml.clean_loss_weight=0"
        )
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
