"""The HTML report of a run: curves, scores and predictions on one page."""
