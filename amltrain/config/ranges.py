"""The range of every number in a run's config; AML's, which depend on its preset, are checked with the preset."""

import math
from typing import Any

from amltrain.errors import UserError

ANY = math.inf
POSITIVE = math.nextafter(0.0, 1.0)

RANGES: dict[str, tuple[float, float]] = {
    "seed": (0, 2**32 - 1),
    "data.workers": (0, ANY),
    "data.max_skipped": (0, 1),
    "data.shapes.train": (1, ANY),
    "data.shapes.evaluation": (1, ANY),
    "data.shapes.size": (16, ANY),  # amltrain.data.shapes.SMALLEST_SCENE
    "data.shapes.seed": (0, ANY),
    "preprocess.size": (1, ANY),
    "preprocess.max_tokens": (1, ANY),
    "optim.lr": (0, ANY),
    "optim.weight_decay": (0, ANY),
    "optim.betas": (0, math.nextafter(1.0, 0.0)),
    "optim.eps": (0, ANY),
    "optim.power": (0, ANY),
    "optim.warmup_steps": (0, ANY),
    "optim.milestones": (0, 1),
    "optim.gamma": (0, ANY),
    "optim.clip_norm": (POSITIVE, ANY),
    "train.epochs": (1, ANY),
    "train.max_steps": (1, ANY),
    "train.stop_after": (1, ANY),
    "train.global_batch_size": (1, ANY),
    "train.micro_batch_size": (1, ANY),
    "train.ema_decay": (0, 1),
    "train.log_every": (1, ANY),
    "train.limit_samples": (1, ANY),
    "train.profile": (1, ANY),
    "train.loader_timeout": (POSITIVE, ANY),
    "train.max_bad_steps": (1, ANY),
    "train.collective_timeout": (POSITIVE, ANY),
    "train.time_limit": (0, ANY),
    "evaluation.every_steps": (1, ANY),
    "evaluation.batch_size": (1, ANY),
    "evaluation.patience": (1, ANY),
    "evaluation.max_samples": (1, ANY),
    "evaluation.pictures": (0, ANY),
    "evaluation.protocol.threshold": (0, 1),
    "evaluation.protocol.no_target_pixels": (0, ANY),
    "checkpoint.every_steps": (1, ANY),
    "checkpoint.keep": (1, ANY),
}
"""Lowest and highest value by key; of a list, of each entry. null is always allowed where the key allows it."""


def check_number(key: str, value: float | None, low: float, high: float) -> None:
    """Raise UserError, naming the key, if a number lies outside its range or is NaN."""
    if value is None or low <= value <= high:
        return
    if low == POSITIVE:
        wanted = "be more than 0"
    elif high == ANY:
        wanted = f"be at least {low:g}"
    else:
        wanted = f"lie between {low:g} and {high:g}"
    raise UserError(f"{key} is {value} and must {wanted}")


def check_ranges(config: Any) -> None:
    """Raise UserError for the first number of a RunConfig outside its range."""
    for key, (low, high) in RANGES.items():
        value = config
        for part in key.split("."):
            value = getattr(value, part)
        for number in value if isinstance(value, (list, tuple)) else [value]:
            if not isinstance(number, str):  # a word that the key takes instead, e.g. checkpoint.keep: all
                check_number(key, number, low, high)
