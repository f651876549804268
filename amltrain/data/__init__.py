"""Annotations to Parquet rows, rows to samples, samples to batches."""
