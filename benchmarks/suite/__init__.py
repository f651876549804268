"""Measure everything on one machine: training, evaluation, loading, saving."""
