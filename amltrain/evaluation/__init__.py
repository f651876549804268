"""Score masks: decisions, metrics, results, comparisons, pictures."""
