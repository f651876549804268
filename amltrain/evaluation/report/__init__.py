"""One self-contained HTML page about a run: curves, scores and predictions."""
