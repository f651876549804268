"""Metrics of referring segmentation, each named as the papers name it. The table is open: see `register_metric`.

For one (image, sentence) sample: I = |prediction and truth|, U = |prediction or truth|, in pixels. Two sets of metrics:

    classic      oIoU ("overall", "cumulative" IoU) = sum I / sum U
                 mIoU ("Mean IoU" in LAVT, "IoU" in CRIS and ETRIS) = mean over samples of I / U
                 Pr@t = share of samples whose IoU reaches t
    generalized  gRefCOCO, where a sentence may refer to several objects or to none (GRES, arXiv 2306.00968):
                 gIoU, cIoU = mean and cumulative IoU with the no-target rule of `no_target_rule`
                 N-acc, T-acc = share of no-target / target samples recognised as such
                 Pr@t over target samples only

Metrics that only some data sets' papers report come in addition, where the data set's entry in `amltrain.data.catalog`
names them:

    r, rIoU               R-RefCOCO, R-RefCOCO+, R-RefCOCOg (arXiv 2209.09554): per ref, then the mean over refs
    zero-target accuracy  Ref-ZOM (arXiv 2308.13853), PBench: share of no-target samples with an empty mask
    target oIoU, mIoU     both papers' oIoU and mIoU: over target samples, without the no-target rule
    Acc@t                 Ref-Adv (arXiv 2602.23898), GSEval (arXiv 2503.10596): share of target samples where the box
                          around the predicted mask and the box around the truth have an IoU of at least t
    DetAcc@0.5            models that give a box of their own (C3VG): share of target samples where it and the true box
                          have an IoU of at least 0.5, in the original image. The true box is the annotated one, or the
                          one around the mask where there is none. The official code of C3VG gives the mean over batches
                          of each batch's share, so that a smaller last batch counts more; here every sample counts 1

Every metric is a ratio of two sums over samples. That makes it exact at any number of processes and gives it bootstrap
intervals. All are in percent (ReLA prints N-acc and T-acc as fractions).

An empty union counts as IoU 0, as in LAVT, CRIS, DETRIS, ReLA and PolyFormer. CARIS (and MaskRIS, AMLRIS) divide 0 by 0
there and report NaN for the whole split; here such samples are counted and reported as `empty_unions`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from amltrain.errors import UserError
from amltrain.registry import METRICS

THRESHOLDS = (0.5, 0.6, 0.7, 0.8, 0.9)
GENERALIZED_THRESHOLDS = (0.7, 0.8, 0.9)
BOX_THRESHOLDS = (0.5, 0.75, 0.9)
CRIS_EPSILON = 1e-6
"""CRIS, ETRIS, DETRIS and CGFormer divide by U + 1e-6, so that an IoU of exactly 0.5 is a little below 0.5."""

Ties = Literal["ge", "gt"]
Kind = Literal["classic", "generalized"]


@dataclass(frozen=True)
class Scored:
    """Columns of a scored split, all [N], one entry per sample.

    intersection, union  pixels, int64
    area                 pixels of the predicted mask, int64
    no_target            bool, the sentence refers to nothing in the image
    predicted_no_target  bool, the model predicts so
    ties                 arithmetic of the IoU, see `sample_iou`
    ref                  number of the ref that the sentence belongs to, int64; None where it is unknown. r and rIoU
                         need it
    box_intersection, box_union  pixels of the boxes around the two masks, int64; None where they are unknown. Acc@t
                                 needs them
    detected_intersection, detected_union  areas of the model's own box and the true one, int64; None where they are
                                           unknown. DetAcc needs them
    """

    intersection: NDArray[np.int64]
    union: NDArray[np.int64]
    area: NDArray[np.int64]
    no_target: NDArray[np.bool_]
    predicted_no_target: NDArray[np.bool_]
    ties: Ties = "ge"
    ref: NDArray[np.int64] | None = None
    box_intersection: NDArray[np.int64] | None = None
    box_union: NDArray[np.int64] | None = None
    detected_intersection: NDArray[np.int64] | None = None
    detected_union: NDArray[np.int64] | None = None

    def __len__(self) -> int:
        return len(self.union)

    @property
    def truth_area(self) -> NDArray[np.int64]:
        """Pixels of the ground truth."""
        return self.union - self.area + self.intersection

    @cached_property
    def iou(self) -> NDArray[np.float64]:
        """IoU of every sample in 0..1, without the no-target rule."""
        return sample_iou(self.intersection, self.union, self.ties)

    @cached_property
    def ruled(self) -> "Ruled":
        """IoU, I and U of every sample by the no-target rule."""
        return no_target_rule(self.intersection, self.union, self.no_target, self.predicted_no_target)

    @cached_property
    def emptied(self) -> "Emptied":
        """I, U and predicted area, where a mask of a sample that the model rejects counts as empty."""
        kept = ~self.predicted_no_target
        return Emptied(self.intersection * kept, np.where(kept, self.union, self.truth_area), self.area * kept)


class Ruled(NamedTuple):
    """What `no_target_rule` returns, all [N]."""

    iou: NDArray[np.float64]
    intersection: NDArray[np.int64]
    union: NDArray[np.int64]


class Emptied(NamedTuple):
    """What `Scored.emptied` returns, all [N] int64 pixels."""

    intersection: NDArray[np.int64]
    union: NDArray[np.int64]
    area: NDArray[np.int64]


class Ratio(NamedTuple):
    """A metric before the division: 100 * sum(numerator) / sum(denominator); both [N]."""

    numerator: NDArray[Any]
    denominator: NDArray[Any]

    def percent(self) -> float:
        """The metric in percent; NaN if the divisor is 0."""
        return 100 * _ratio(self.numerator.sum(), self.denominator.sum())


Metric = Callable[[Scored], Ratio]
ON_REQUEST: set[str] = set()
"""Metrics that only data sets whose papers use them report."""


def register_metric(name: str, *kinds: Kind, on_request: bool = False) -> Callable[[Metric], Metric]:
    """Decorate a function of `Scored` that returns a `Ratio`: every evaluation of these kinds then reports it.

    kinds: "classic", "generalized", or both. on_request: report it only for data sets that name it. Raises UserError
    for a name that is taken.
    """
    if on_request:
        ON_REQUEST.add(name)

    def register(metric: Metric) -> Metric:
        for kind in kinds:
            METRICS[kind].add(name, metric)
        return metric

    return register


def list_metrics() -> list[str]:
    """Names of all metrics, classic ones first."""
    return list(dict.fromkeys(entry.name for table in METRICS.values() for entry in table.registered()))


def metric_terms(name: str, samples: Scored, kind: Kind) -> Ratio:
    """Return a metric before the division. Raises UserError for an unknown name."""
    return METRICS[kind][name].value(samples)


def compute_scores(samples: Scored, kind: Kind) -> dict[str, float]:
    """Every metric of a kind but those of ON_REQUEST, in percent, by name; NaN if the divisor is 0.

    Raises UserError where an intersection is negative or larger than its union.
    """
    if (samples.intersection > samples.union).any() or (samples.intersection < 0).any():
        raise UserError("an intersection must lie between 0 and its union; were the two columns exchanged?")
    return {
        entry.name: entry.value(samples).percent()
        for entry in METRICS[kind].registered()
        if entry.name not in ON_REQUEST
    }


def _ratio(numerator: float, denominator: float) -> float:
    return float(numerator) / float(denominator) if denominator else float("nan")


def sample_iou(intersections: NDArray[np.int64], unions: NDArray[np.int64], ties: Ties = "ge") -> NDArray[np.float64]:
    """IoU of every sample, [N] float64 in 0..1; an empty union gives 0.

    ties: "ge" divides I by U; "gt" (CRIS family) by U + 1e-6.
    """
    if ties == "gt":
        return intersections / (unions + CRIS_EPSILON)
    return np.divide(intersections, unions, out=np.zeros(len(unions)), where=unions > 0)


def reaches(iou: NDArray[np.float64], threshold: float, ties: Ties = "ge") -> NDArray[np.bool_]:
    """[N] bool: the IoU reaches the threshold ("ge"), or exceeds it as a float32 ("gt", CRIS family)."""
    return iou >= threshold if ties == "ge" else iou > np.float64(np.float32(threshold))


def no_target_rule(
    intersections: NDArray[np.int64],
    unions: NDArray[np.int64],
    no_target: NDArray[np.bool_],
    predicted_no_target: NDArray[np.bool_],
) -> Ruled:
    """IoU, I and U of every sample by the rule of ReLA's evaluator; arguments and results are [N].

    | sentence  | prediction | IoU     | adds to sum I | adds to sum U                             |
    |-----------|------------|---------|---------------|-------------------------------------------|
    | no target | no target  | 1       | 0             | 0, whatever the mask                      |
    | no target | target     | 0       | 0             | U, the area of the predicted mask         |
    | target    | no target  | 0       | 0             | U, of the mask as if no target were unset |
    | target    | target     | I / U   | I             | U                                         |
    """
    both_have_target = ~no_target & ~predicted_no_target
    rejected = no_target & predicted_no_target
    iou = np.where(both_have_target, sample_iou(intersections, unions), 0.0)
    return Ruled(
        np.where(rejected, 1.0, iou),
        np.where(both_have_target, intersections, 0),
        np.where(rejected, 0, unions),
    )


@register_metric("oIoU", "classic")
def overall_iou(samples: Scored) -> Ratio:
    """Sum of I / sum of U."""
    return Ratio(samples.intersection, samples.union)


@register_metric("mIoU", "classic")
def mean_iou(samples: Scored) -> Ratio:
    """Mean of I / U."""
    return Ratio(samples.iou, np.ones(len(samples)))


@register_metric("gIoU", "generalized")
def generalized_mean_iou(samples: Scored) -> Ratio:
    """Mean IoU with the no-target rule."""
    return Ratio(samples.ruled.iou, np.ones(len(samples)))


@register_metric("cIoU", "generalized")
def cumulative_iou(samples: Scored) -> Ratio:
    """Sum of I / sum of U with the no-target rule."""
    return Ratio(samples.ruled.intersection, samples.ruled.union)


@register_metric("N-acc", "generalized")
def no_target_accuracy(samples: Scored) -> Ratio:
    """Share of no-target samples recognised as such; 0 without any, as ReLA prints it."""
    if not samples.no_target.any():
        return _zero(samples)
    return Ratio(samples.no_target & samples.predicted_no_target, samples.no_target)


@register_metric("T-acc", "generalized")
def target_accuracy(samples: Scored) -> Ratio:
    """Share of target samples recognised as such; 0 without any no-target sample, as ReLA prints it."""
    if not samples.no_target.any():
        return _zero(samples)
    return Ratio(~samples.no_target & ~samples.predicted_no_target, ~samples.no_target)


@register_metric("target oIoU", "generalized", on_request=True)
def target_overall_iou(samples: Scored) -> Ratio:
    """Sum of I / sum of U over target samples."""
    i, u, _ = samples.emptied
    return Ratio(i * ~samples.no_target, u * ~samples.no_target)


@register_metric("target mIoU", "generalized", on_request=True)
def target_mean_iou(samples: Scored) -> Ratio:
    """Mean of I / U over target samples (RefSegformer averages per ref first)."""
    i, u, _ = samples.emptied
    return Ratio(sample_iou(i, u) * ~samples.no_target, ~samples.no_target)


@register_metric("zero-target accuracy", "generalized", on_request=True)
def zero_target_accuracy(samples: Scored) -> Ratio:
    """Share of no-target samples whose predicted mask is empty."""
    return Ratio(samples.no_target & (samples.emptied.area == 0), samples.no_target)


GSVA_METRICS = ("gIoU (GSVA)", "cIoU (GSVA)")
"""Of language models that can reject: as gIoU and cIoU, but a rejected target is scored by the mask that was drawn for
it all the same. Source: the official code of GSVA (CVPR 2024)."""


@register_metric(GSVA_METRICS[0], "generalized", on_request=True)
def mean_iou_of_drawn(samples: Scored) -> Ratio:
    """Mean IoU; 1 for a rejected no-target sample, 0 for another."""
    absent = np.where(samples.predicted_no_target, 1.0, 0.0)
    return Ratio(np.where(samples.no_target, absent, samples.iou), np.ones(len(samples)))


@register_metric(GSVA_METRICS[1], "generalized", on_request=True)
def cumulative_iou_of_drawn(samples: Scored) -> Ratio:
    """Sum of I / sum of U; a rejected no-target sample adds nothing."""
    i = np.where(samples.no_target, 0, samples.intersection)
    return Ratio(i, np.where(samples.no_target & samples.predicted_no_target, 0, samples.union))


@register_metric("r", "generalized", on_request=True)
def negative_robustness(samples: Scored) -> Ratio:
    """Share of a ref's no-target sentences with an empty mask, mean over refs that have such sentences."""
    weight = samples.no_target / np.maximum(_per_ref(samples, samples.no_target), 1)
    return Ratio(weight * (samples.emptied.area == 0), weight)


@register_metric("rIoU", "generalized", on_request=True)
def robust_iou(samples: Scored) -> Ratio:
    """Sum of I / sum of U of a ref, where every pixel predicted for a no-target sentence adds to U; mean over refs.

    A ref without a target sentence, whose sum of I cannot be above 0, is left out.
    """
    i, u, area = samples.emptied
    has_target = _per_ref(samples, ~samples.no_target) > 0
    total_i = _per_ref(samples, np.where(samples.no_target, 0, i))
    total_u = _per_ref(samples, np.where(samples.no_target, area, u))
    share = has_target / _per_ref(samples, np.ones(len(samples)))  # every ref counts 1, whatever its sentences
    return Ratio(share * total_i / np.maximum(total_u, 1), share)


def _register_box_accuracy(threshold: float) -> None:
    @register_metric(f"Acc@{threshold}", "classic", "generalized", on_request=True)
    def box_accuracy(samples: Scored) -> Ratio:
        if samples.box_intersection is None or samples.box_union is None:
            raise UserError(f"Acc@{threshold} needs the boxes of every sample; evaluate again with this version")
        found = sample_iou(samples.box_intersection, samples.box_union) * ~samples.predicted_no_target
        return Ratio((found >= threshold) & ~samples.no_target, ~samples.no_target)


for _threshold in BOX_THRESHOLDS:
    _register_box_accuracy(_threshold)


BOX_METRICS = ("DetAcc@0.5",)
"""Of models with a box of their own, reported wherever there is one."""


@register_metric(BOX_METRICS[0], "classic", "generalized", on_request=True)
def detection_accuracy(samples: Scored) -> Ratio:
    """Share of target samples whose predicted box has an IoU of at least 0.5 with the true one."""
    if samples.detected_intersection is None or samples.detected_union is None:
        raise UserError("DetAcc@0.5 needs the model's boxes of every sample; evaluate again with this version")
    found = sample_iou(samples.detected_intersection, samples.detected_union) * ~samples.predicted_no_target
    return Ratio((found >= 0.5) & ~samples.no_target, ~samples.no_target)


def _per_ref(samples: Scored, values: NDArray[Any]) -> NDArray[np.float64]:
    """Sum of `values` [N] over the ref of each sample, [N]."""
    if samples.ref is None:
        raise UserError("r and rIoU need the ref of every sample; evaluate again with this version")
    _, number = np.unique(samples.ref, return_inverse=True)
    return np.bincount(number, weights=values).astype(np.float64)[number]


def _zero(samples: Scored) -> Ratio:
    return Ratio(np.zeros(len(samples)), np.ones(len(samples)))


def _register_precision(threshold: float) -> None:
    @register_metric(f"Pr@{threshold}", "classic")
    def precision(samples: Scored) -> Ratio:
        return Ratio(reaches(samples.iou, threshold, samples.ties), np.ones(len(samples)))

    if threshold in GENERALIZED_THRESHOLDS:

        @register_metric(f"Pr@{threshold}", "generalized")
        def target_precision(samples: Scored) -> Ratio:
            return Ratio(reaches(samples.ruled.iou, threshold) & ~samples.no_target, ~samples.no_target)


for _threshold in THRESHOLDS:
    _register_precision(_threshold)


def scored_columns(
    intersections: ArrayLike,
    unions: ArrayLike,
    no_target: ArrayLike | None = None,
    predicted_no_target: ArrayLike | None = None,
    areas: ArrayLike | None = None,
    ties: Ties = "ge",
    refs: ArrayLike | None = None,
    boxes: tuple[ArrayLike, ArrayLike] | None = None,
    detected: tuple[ArrayLike, ArrayLike] | None = None,
) -> Scored:
    """Build a `Scored` from anything array-like, [N] each; flags default to false, areas to the intersections.

    boxes: intersections and unions of the boxes around the masks. detected: the same of the model's own boxes.
    """
    i, u = np.asarray(intersections, np.int64), np.asarray(unions, np.int64)
    none = np.zeros(len(u), bool)
    truth, predicted = (none if flag is None else np.asarray(flag, bool) for flag in (no_target, predicted_no_target))
    ref = None if refs is None else np.asarray(refs, np.int64)
    area = i if areas is None else np.asarray(areas, np.int64)
    areas_of = [(None, None) if pair is None else [np.asarray(c, np.int64) for c in pair] for pair in (boxes, detected)]
    return Scored(i, u, area, truth, predicted, ties, ref, *areas_of[0], *areas_of[1])


def number_refs(image_ids: ArrayLike, ref_ids: ArrayLike) -> NDArray[np.int64]:
    """Number the refs of samples, [N] int64: ids of refs may occur again in other images."""
    pairs = np.stack([np.asarray(image_ids, np.int64), np.asarray(ref_ids, np.int64)], axis=1)
    return np.unique(pairs, axis=0, return_inverse=True)[1].reshape(-1)


def take(samples: Scored, index: Sequence[int] | NDArray[Any]) -> Scored:
    """Select samples by position or by a [N] bool mask."""
    columns = {f.name: getattr(samples, f.name) for f in fields(samples) if f.name != "ties"}
    taken = {name: column[index] for name, column in columns.items() if column is not None}
    return Scored(**taken, ties=samples.ties)
