"""Charts hold the values of the log and nothing that leaves the page."""

import re

import numpy as np

from amltrain.report.curves import (
    VARIABLES,
    by_length,
    histogram,
    training_charts,
)

ROWS = [
    {"step": 10.0, "loss": 0.5, "lr_factor": 1.0, "masked_share": 0.1, "mean_score": 0.7},
    {"step": 20.0, "val/oIoU": 40.0, "val/mIoU": 38.0, "testA/oIoU": 41.0},
    {"step": 30.0, "loss": float("nan"), "alignment/below_0.4": 0.2},
]


def test_a_chart_for_everything_that_was_logged() -> None:
    titles = [chart.title for chart in training_charts(ROWS)]
    assert titles == [
        "Training loss",
        "Scores on testA, percent",
        "Scores on val, percent",
        "Learning rate factor",
        "Share of blocks masked, mean alignment score",
        "Share of patches below a score",
    ]
    assert training_charts([]) == []


def test_scores_of_one_evaluation_are_bars_with_their_numbers() -> None:
    one = {chart.title: chart.svg for chart in training_charts(ROWS)}["Scores on val, percent"]
    assert all(text in one for text in (">40<", ">38<", ">oIoU<", ">mIoU<", ">step 20<"))
    two = training_charts([*ROWS, {"step": 40.0, "val/oIoU": 45.0}])
    assert ">step 20<" not in {chart.title: chart.svg for chart in two}["Scores on val, percent"]


def test_the_page_gives_the_colours() -> None:
    charts = [*training_charts(ROWS), histogram("IoU", np.array([0.1, 0.9])), by_length("L", np.ones(3), np.arange(3))]
    for chart in charts:
        assert chart.svg.startswith("<svg")
        assert not any(colour in chart.svg for colour in VARIABLES)
        assert "var(--ink)" in chart.svg
        assert not re.search(r'(?:href|src)="(?!#)', chart.svg)
