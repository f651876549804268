"""Alignment scores and masks of a trained model, for reports and demos: what AML's own masker gives.

A model folder holds no temperature, so it is solved on the first samples, as a training run solves it on its first
batches.
"""

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

import torch

from amltrain.errors import UserError
from amltrain.methods.aml.masker import build_alignment_masker
from amltrain.methods.aml.options import AMLOptions
from amltrain.methods.aml.presets import resolve
from amltrain.methods.aml.settings import of_finished_model
from amltrain.methods.maskers import Masking
from amltrain.models.base import RISModel
from amltrain.records import Batch


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
    try:
        return Aligner(model, AMLOptions(**given), trained)
    except (AttributeError, UserError):
        return None
