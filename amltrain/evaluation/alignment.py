"""Alignment scores and AML masks of a trained model, for reports and demos.

The scores are those of AML's stage 1 (PMME of features before cross-modal fusion). A model folder holds no temperature,
so it is solved on the first samples that are looked at, as a training run solves it on its first batches.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from amltrain.errors import UserError
from amltrain.methods.aml.masking import filtering_mask
from amltrain.methods.aml.similarity import PatchScorer, create_projection, patch_max
from amltrain.methods.aml.temperature import solve_temperature
from amltrain.models.base import RISModel
from amltrain.records import AlignmentFeatures, Batch

PAPER: dict[str, Any] = {
    "projection": "random", "dim": 2048, "projection_seed": 0, "normalize": True, "score_padding": False,
    "temperature": "auto", "tau": 0.4, "rho": 0.25, "block": 32, "selection": "pixel",
}  # fmt: skip
"""Settings of the paper, used for what a run does not set."""


class AlignmentMaps(NamedTuple):
    """scores [B, h, w] float32 in 0..1; blocks [B, r, c] bool, True = AML would mask this block in training."""

    scores: Tensor
    blocks: Tensor


class Aligner:
    """Scores images against sentences as AML does.

    settings   the run's, or the paper's; tau is the score below which a patch is weak, block the side of a masked block
    trained    whether the model was trained with AML, so that its masks are what training saw
    """

    def __init__(self, model: RISModel, settings: Mapping[str, Any] | None = None, trained: bool = False) -> None:
        """settings: values that replace those of `PAPER`; None values and other keys are ignored."""
        given = {k: v for k, v in (settings or {}).items() if k in PAPER and v is not None}
        self.settings, self.trained = PAPER | given, trained
        s, (visual, text) = self.settings, model.alignment_dims
        if s["projection"] == "learnable":  # its matrices are in the training state only; these are where they started
            s["projection"] = "random"
        self.model = model
        fixed = None if s["temperature"] == "auto" else float(s["temperature"])
        projection = create_projection(s["projection"], visual, text, dim=s["dim"], seed=s["projection_seed"])
        device = next(model.parameters()).device
        scorer = PatchScorer(projection, temperature=fixed, normalize=s["normalize"], score_padding=s["score_padding"])
        self.scorer = scorer.to(device)

    @property
    def tau(self) -> float:
        return float(self.settings["tau"])

    @torch.no_grad()
    def calibrate(self, batches: Sequence[Batch], *, again: bool = False) -> None:
        """Solve an automatic temperature on batches on the model's device. Raises UserError if none fits.

        again: also if it was solved before.
        """
        if bool(self.scorer.calibrated) and not (again and self.settings["temperature"] == "auto"):
            return
        scored = [(self.scorer.logits(f), self.scorer.token_mask(f)) for f in map(self._features, batches)]
        self.scorer.temperature.fill_(solve_temperature(scored).temperature)
        self.scorer.calibrated.fill_(True)

    @torch.no_grad()
    def __call__(self, batch: Batch) -> AlignmentMaps:
        """Score a batch on the model's device. An automatic temperature is solved on it if it was not before."""
        self.calibrate([batch])
        features = self._features(batch)
        logits = self.scorer.logits(features)
        scores = patch_max(logits, self.scorer.temperature.float(), self.scorer.token_mask(features))
        scores = scores.unflatten(1, features.visual.shape[-2:])
        s, size = self.settings, (batch.image.shape[-2], batch.image.shape[-1])
        blocks = filtering_mask(
            scores, size, batch.random_key, tau=s["tau"], rho=s["rho"], block=s["block"], selection=s["selection"]
        )
        return AlignmentMaps(scores, blocks)

    def _features(self, batch: Batch) -> AlignmentFeatures:
        return self.model.alignment_features(batch)


def build_aligner(model: RISModel, training: Mapping[str, Any] | None) -> Aligner | None:
    """Build an aligner with the settings of the run that trained the model; None where its features cannot be scored.

    training: the content of the model folder's training.json, or None.
    """
    recipe = (training or {}).get("recipe", {})
    section = recipe.get("aml") or {}
    trained = recipe.get("method") == "aml" or bool(section.get("enabled"))
    if section.get("preset") == "released":
        released = {"projection": "linear", "normalize": False, "score_padding": True, "selection": "released"}
        section = {**released, "temperature": 1.0, **{k: v for k, v in section.items() if v is not None}}
    try:
        return Aligner(model, section, trained)
    except (AttributeError, UserError):
        return None
