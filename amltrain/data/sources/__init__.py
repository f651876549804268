"""Read annotations of every origin into the same source rows; `frame` checks and repairs them in one place."""
