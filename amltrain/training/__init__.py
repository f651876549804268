"""Train a run: the loop, its callbacks, and what a run is built of."""
