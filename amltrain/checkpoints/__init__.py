"""A run's folder on disk: checkpoints, training state, lock, resume, provenance."""
