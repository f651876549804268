"""Tables and pictures of alignment scores: several models (Fig. 6), the checkpoints of a run (Tables 12, 13).

Alignment scores of finished models: histogram (Fig. 6), dynamics (Tables 12, 13), and what they know.

The paper's scorer is early features, two fixed Gaussian projections, softmax over tokens at a solved temperature.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from amltrain.errors import UserError
from amltrain.evaluation.tables import markdown
from amltrain.methods.aml.masker import AlignmentMasker, build_alignment_masker
from amltrain.methods.aml.options import AMLOptions, resolve
from amltrain.methods.aml.recorder import alignment_sums, summarise
from amltrain.methods.aml.scorers import EarlyScorer, GroundedProjection, GroundedScorer, Scorer, grounding_loss
from amltrain.models.base import RISModel
from amltrain.paper.figures import COLOURS, saved_figure
from amltrain.records import AlignmentFeatures, Batch

PANELS = (
    ("alignment scores", ("score_mean", "score_std", "above_0.5", "above_0.9")),
    ("share of the referents' area in patches below", tuple(f"referent_below_{tau}" for tau in (0.2, 0.3, 0.4, 0.6))),
)


def histogram_table(shares: Mapping[str, NDArray[np.float64]], statistics: Mapping[str, Mapping[str, float]]) -> str:
    """Percent of the patches in every bin, one column per model, and statistics below."""
    bins = len(next(iter(shares.values())))
    rows = [
        (f"{i / bins:.2f} to {(i + 1) / bins:.2f}", *(f"{100 * values[i]:.2f}" for values in shares.values()))
        for i in range(bins)
    ]
    return "\n".join(
        [*markdown([("score", *shares), *rows], text_columns=1), "", statistics_table(statistics, "model")]
    )


def statistics_table(statistics: Mapping[str, Mapping[str, float]], what: str) -> str:
    """Return a table: one row per model or checkpoint, one column per statistic."""
    names = list(next(iter(statistics.values())))
    rows = [(row, *(f"{values[name]:.4f}" for name in names)) for row, values in statistics.items()]
    return "\n".join(markdown([(what, *(n.replace("_", " ") for n in names)), *rows], text_columns=1))


def draw_histogram(shares: Mapping[str, NDArray[np.float64]], path: Path) -> None:
    """Both distributions as steps over 0..1."""
    with saved_figure(path, (6, 4)) as figure:
        axes = figure.subplots()
        for i, (model, values) in enumerate(shares.items()):
            edges = np.linspace(0, 1, len(values) + 1)
            axes.stairs(100 * values, edges, fill=True, alpha=0.3, color=COLOURS[i % len(COLOURS)], label=model)
            axes.stairs(100 * values, edges, color=COLOURS[i % len(COLOURS)])
        axes.set_xlabel("alignment score")
        axes.set_ylabel("patches (%)")
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)


def draw_dynamics(steps: Sequence[int], statistics: Sequence[Mapping[str, float]], path: Path) -> None:
    """Statistics over the steps of a run, two panels."""
    with saved_figure(path, (10, 3.8)) as figure:
        for axes, (title, names) in zip(figure.subplots(1, len(PANELS)), PANELS, strict=True):
            for i, name in enumerate(names):
                values = [s[name] for s in statistics]
                axes.plot(steps, values, marker="o", label=name.replace("_", " "), color=COLOURS[i % len(COLOURS)])
            axes.set_title(title, loc="left", fontsize=10)
            axes.set_xlabel("step")
            axes.set_ylim(bottom=0)
            axes.spines[["top", "right"]].set_visible(False)
            axes.legend(frameon=False, fontsize="small")


BINS = 20
"""Bins of a histogram over 0..1."""
CANDIDATES: dict[str, AMLOptions] = {
    "paper": AMLOptions(),
    "late": AMLOptions(features="late"),
    "late_identity": AMLOptions(features="late", projection="identity"),
    "identity": AMLOptions(projection="identity"),
    "cosine": AMLOptions(projection="cosine"),
    "prediction": AMLOptions(features="pred"),
    "grounded": AMLOptions(projection="grounded", dim=256),
    "grounded_late": AMLOptions(features="late", projection="grounded", dim=256),
}
"""Scores by name that `amltrain analyse diagnose` compares."""
FIT_STEPS, FIT_RATE, FIT_BATCH = 500, 3e-3, 64
"""How `fit_grounded` trains a projection on features of a finished model."""


class Collected(NamedTuple):
    """Scores of a batch, on the CPU: scores, shuffled and other [B, h, w] float32, blocks [B, r, c] bool, target
    [B, H, W] uint8. shuffled: of the next sample's sentence; other: of projections of another seed; or None.
    """

    scores: Tensor
    blocks: Tensor
    target: Tensor
    shuffled: Tensor | None = None
    other: Tensor | None = None


def candidate_masker(
    model: RISModel, name: str, batches: Sequence[Batch], *, temperature: float | None = None, seed: int = 0
) -> AlignmentMasker:
    """The masker of a candidate. temperature: None = solved on `batches`. seed: of its projections.

    Raises UserError for a candidate that this model's features cannot have, and where no temperature can be solved.
    """
    settings = replace(resolve(CANDIDATES[name]), projection_seed=seed, diagnostics_every=1)
    if temperature is not None:
        settings = replace(settings, temperature=temperature)
    masker = build_alignment_masker(model, settings).to(batches[0].image.device)
    if masker.needs_calibration:
        masker.calibrate(model, batches)
    return masker


def fits_model(model: RISModel, name: str) -> str | None:
    """Why this model cannot have a candidate, in one line; None = it can."""
    try:
        build_alignment_masker(model, resolve(CANDIDATES[name]))
    except UserError as error:
        return str(error)
    return None


def collect_scores(model: RISModel, masker: AlignmentMasker, batches: Iterable[Batch]) -> list[Collected]:
    """Scores of every batch with its own sentences, and with those of the next sample, for which the model runs again.

    The model must be in eval mode.
    """
    found = []
    with torch.no_grad():
        for batch in batches:
            probe = masker.probe(model, batch)
            shuffled = masker.scorer(model, with_next_sentence(batch)) if len(batch.image) > 1 else None
            parts = (probe.scores, masker.blocks(probe.scores, batch), batch.target, shuffled, probe.other)
            found.append(Collected(*(None if part is None else part.detach().cpu() for part in parts)))  # type: ignore[arg-type]
    return found


def with_next_sentence(batch: Batch) -> Batch:
    """The batch's images, each with the next sample's sentence."""
    return batch._replace(input_ids=batch.input_ids.roll(-1, 0), text_mask=batch.text_mask.roll(-1, 0))


def fit_grounded(model: RISModel, scorer: GroundedScorer, batches: Iterable[Batch], *, steps: int = FIT_STEPS) -> float:
    """Train a grounded projection on features of these batches, as a run trains it beside the model.

    The model must be in eval mode and keeps its weights; its features are computed once. Returns the last loss. The
    order of the samples is a function of the step.
    """
    with torch.no_grad():
        parts = [(*scorer.features(model, batch), batch.target) for batch in batches]
    visual, text, mask, target = (torch.cat(rows) for rows in zip(*parts, strict=True))
    projection: GroundedProjection = scorer.projection
    optimizer = torch.optim.AdamW(projection.parameters(), lr=FIT_RATE, weight_decay=0.01)
    order = torch.Generator().manual_seed(0)
    loss = torch.zeros(())
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = FIT_RATE * (1 - step / steps)
        rows = torch.randperm(len(target), generator=order)[:FIT_BATCH].to(target.device)
        scores = projection(AlignmentFeatures(visual[rows], text[rows], mask[rows]))
        loss = grounding_loss(scores, target[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss.item()


def score_histogram(collected: Sequence[Collected]) -> NDArray[np.float64]:
    """Share of the patches in every bin of 0..1, [BINS], summing to 1."""
    values = torch.cat([part.scores.flatten() for part in collected]).numpy()
    counts, _ = np.histogram(np.clip(values, 0, 1), bins=BINS, range=(0, 1))
    return counts / max(1, len(values))


def score_statistics(collected: Sequence[Collected], block: int = 32) -> dict[str, float]:
    """Every statistic of `STATISTICS` by name, over all batches. block: side of a masked block, pixels."""
    sums = [alignment_sums(c.scores, c.blocks, c.target, block, c.shuffled, c.other) for c in collected]
    return summarise(torch.stack(sums).double().sum(0))


def has_temperature(scorer: Scorer) -> bool:
    """Whether a scorer has a temperature."""
    return isinstance(scorer, EarlyScorer)
