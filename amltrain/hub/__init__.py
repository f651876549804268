"""Model folders, conversion of official checkpoints, model cards and the HuggingFace Hub."""
