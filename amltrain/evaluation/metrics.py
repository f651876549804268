"""Referring-segmentation metrics from per-sample intersections and unions, each named as the papers name it.

For one (image, sentence) sample: I = |prediction and truth|, U = |prediction or truth|, in pixels. Two sets of metrics:

    classic      oIoU ("overall", "cumulative", LAVT's and DETRIS' overall IoU) = sum I / sum U
                 mIoU (LAVT "Mean IoU", CRIS and ETRIS "IoU") = mean over samples of I / U
                 Pr@t = share of samples whose IoU reaches t
    generalized  gRefCOCO, sentences that mean several things or nothing (GRES, arXiv 2306.00968, evaluator of ReLA):
                 gIoU, cIoU = mean and cumulative IoU with the no-target rule of `no_target_rule`
                 N-acc, T-acc = share of no-target / target samples recognised as such
                 Pr@t over target samples only

Everything is in percent (ReLA prints N-acc and T-acc as fractions).

An empty union counts as IoU 0, as in LAVT, CRIS, DETRIS, ReLA and PolyFormer. CARIS (and MaskRIS, AMLRIS) divide 0 by 0
there and report NaN for the whole split; here such samples are counted and reported as `empty_unions` instead.
"""

from collections.abc import Sequence
from typing import Any, Literal

import datasets
import evaluate
import numpy as np
from numpy.typing import ArrayLike, NDArray

from amltrain.errors import UserError

THRESHOLDS = (0.5, 0.6, 0.7, 0.8, 0.9)
GENERALIZED_THRESHOLDS = (0.7, 0.8, 0.9)
CRIS_EPSILON = 1e-6
"""CRIS, ETRIS, DETRIS and CGFormer divide by U + 1e-6, so that an IoU of exactly 0.5 is a little below 0.5."""

Ties = Literal["ge", "gt"]


def _ratio(numerator: float, denominator: float) -> float:
    return float(numerator) / float(denominator) if denominator else float("nan")


def sample_iou(intersections: NDArray[np.int64], unions: NDArray[np.int64], ties: Ties = "ge") -> NDArray[np.float64]:
    """IoU of every sample, [N] float64 in 0..1; an empty union gives 0.

    ties: "ge" divides I by U; "gt" (CRIS family) by U + 1e-6.
    """
    if ties == "gt":
        return intersections / (unions + CRIS_EPSILON)
    return np.divide(intersections, unions, out=np.zeros(len(unions)), where=unions > 0)


def precision_at(iou: NDArray[np.float64], threshold: float, ties: Ties = "ge") -> float:
    """Percent of samples whose IoU reaches the threshold ("ge"), or exceeds it as a float32 ("gt", CRIS family)."""
    hits = iou >= threshold if ties == "ge" else iou > np.float64(np.float32(threshold))
    return 100 * _ratio(hits.sum(), len(iou))


def no_target_rule(
    intersections: NDArray[np.int64],
    unions: NDArray[np.int64],
    no_target: NDArray[np.bool_],
    predicted_no_target: NDArray[np.bool_],
) -> tuple[NDArray[np.float64], NDArray[np.int64], NDArray[np.int64]]:
    """(IoU, I, U) of every sample by ReLA's rule; arguments and results are [N].

    | sentence  | prediction | IoU     | adds to sum I | adds to sum U                         |
    |-----------|------------|---------|---------------|---------------------------------------|
    | no target | no target  | 1       | 0             | 0, whatever the mask                  |
    | no target | target     | 0       | 0             | U, the area of the predicted mask     |
    | target    | no target  | 0       | 0             | U, of the mask as if it were not void |
    | target    | target     | I / U   | I             | U                                     |
    """
    both_have_target = ~no_target & ~predicted_no_target
    rejected = no_target & predicted_no_target
    iou = np.where(both_have_target, sample_iou(intersections, unions), 0.0)
    return (
        np.where(rejected, 1.0, iou),
        np.where(both_have_target, intersections, 0),
        np.where(rejected, 0, unions),
    )


def classic_scores(
    intersections: ArrayLike, unions: ArrayLike, *, ties: Ties = "ge", thresholds: Sequence[float] = THRESHOLDS
) -> dict[str, float]:
    """oIoU, mIoU and Pr@t in percent; NaN where there is nothing to divide by.

    intersections, unions: [N] pixels. ties: "ge" is the arithmetic of LAVT, CARIS, ReLA and PolyFormer, "gt" that of
    CRIS, ETRIS, DETRIS and CGFormer (see `sample_iou`, `precision_at`).
    """
    i, u = np.asarray(intersections, np.int64), np.asarray(unions, np.int64)
    iou = sample_iou(i, u, ties)
    scores = {"oIoU": 100 * _ratio(i.sum(), u.sum()), "mIoU": 100 * _ratio(iou.sum(), len(iou))}
    return scores | {f"Pr@{t}": precision_at(iou, t, ties) for t in thresholds}


def generalized_scores(
    intersections: ArrayLike,
    unions: ArrayLike,
    no_target: ArrayLike,
    predicted_no_target: ArrayLike,
    *,
    thresholds: Sequence[float] = GENERALIZED_THRESHOLDS,
) -> dict[str, float]:
    """gIoU, cIoU, N-acc, T-acc and Pr@t in percent by ReLA's evaluator; all arguments are [N].

    Where no sample is a no-target sample, N-acc and T-acc are 0, as ReLA prints them. A ratio over nothing else (every
    sample a rejected no-target sample; ReLA stops with ZeroDivisionError) is NaN.
    """
    i, u = np.asarray(intersections, np.int64), np.asarray(unions, np.int64)
    truth, said = np.asarray(no_target, bool), np.asarray(predicted_no_target, bool)
    iou, kept_i, kept_u = no_target_rule(i, u, truth, said)
    none = not truth.any()
    scores = {
        "gIoU": 100 * _ratio(iou.sum(), len(iou)),
        "cIoU": 100 * _ratio(kept_i.sum(), kept_u.sum()),
        "N-acc": 0.0 if none else 100 * _ratio((truth & said).sum(), truth.sum()),
        "T-acc": 0.0 if none else 100 * _ratio((~truth & ~said).sum(), (~truth).sum()),
    }
    return scores | {f"Pr@{t}": precision_at(iou[~truth], t) for t in thresholds}


class ReferringSegmentation(evaluate.Metric):
    """The two sets of metrics as one `evaluate.Metric`; constructed here, never fetched from the Hub.

    metric = ReferringSegmentation(keep_in_memory=True)
    metric.add_batch(intersections=i, unions=u, no_target=nt, predicted_no_target=said)
    metric.compute(generalized=False, ties="ge")
    """

    def _info(self) -> evaluate.MetricInfo:
        flag, pixels = datasets.Value("bool"), datasets.Value("int64")
        return evaluate.MetricInfo(
            description="oIoU, mIoU, Pr@t; on gRefCOCO gIoU, cIoU, N-acc, T-acc, Pr@t.",
            citation="LAVT (arXiv 2112.02244), GRES (arXiv 2306.00968)",
            inputs_description=(
                "intersections, unions: pixels of every sample; no_target: the sentence means nothing in the image; "
                "predicted_no_target: the model says so."
            ),
            features=datasets.Features(
                {"intersections": pixels, "unions": pixels, "no_target": flag, "predicted_no_target": flag}
            ),
        )

    def _compute(self, *, generalized: bool = False, ties: Ties = "ge", **columns: Any) -> dict[str, float]:
        """Scores in percent, with `samples`, `no_target` and `empty_unions` counted beside them."""
        i, u, truth = (np.asarray(columns[k]) for k in ("intersections", "unions", "no_target"))
        if (i > u).any() or (i < 0).any():
            raise UserError("an intersection must lie between 0 and its union; were the two columns exchanged?")
        if generalized:
            scores = generalized_scores(i, u, truth, columns["predicted_no_target"])
        else:
            scores = classic_scores(i, u, ties=ties)
        counts = {"samples": len(u), "no_target": int(truth.sum()), "empty_unions": int((u == 0).sum())}
        return scores | counts
