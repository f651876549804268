"""The metrics as one HuggingFace `evaluate.Metric`. A file of its own, because `evaluate` takes a second to import."""

from typing import Any

import datasets
import evaluate

from amltrain.evaluation.metrics import Ties, compute_scores, scored_columns


class ReferringSegmentation(evaluate.Metric):
    """Both sets of metrics as one `evaluate.Metric`; constructed here, never fetched from the Hub.

    metric = ReferringSegmentation(keep_in_memory=True)
    metric.add_batch(intersections=i, unions=u, areas=a, no_target=nt, predicted_no_target=predicted)
    metric.compute(generalized=False, ties="ge")
    """

    def _info(self) -> evaluate.MetricInfo:
        flag, pixels = datasets.Value("bool"), datasets.Value("int64")
        return evaluate.MetricInfo(
            description="oIoU, mIoU, Pr@t; on gRefCOCO gIoU, cIoU, N-acc, T-acc, Pr@t.",
            citation="LAVT (arXiv 2112.02244), GRES (arXiv 2306.00968)",
            inputs_description=(
                "intersections, unions, areas of the predicted masks: pixels of every sample; no_target: the sentence "
                "refers to nothing in the image; predicted_no_target: the model predicts so."
            ),
            features=datasets.Features(
                {
                    "intersections": pixels,
                    "unions": pixels,
                    "areas": pixels,
                    "no_target": flag,
                    "predicted_no_target": flag,
                }
            ),
        )

    def _compute(self, *, generalized: bool = False, ties: Ties = "ge", **columns: Any) -> dict[str, float]:
        """Scores in percent, with the counts `samples`, `no_target`, `empty_unions` and `empty_masks`."""
        samples = scored_columns(**columns, ties="ge" if generalized else ties)
        counts = {
            "samples": len(samples),
            "no_target": int(samples.no_target.sum()),
            "empty_unions": int((samples.union == 0).sum()),
            "empty_masks": int((samples.area == 0).sum()),
        }
        return compute_scores(samples, "generalized" if generalized else "classic") | counts
