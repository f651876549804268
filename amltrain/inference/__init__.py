"""Use a trained model: predictor, demo, exported files."""
