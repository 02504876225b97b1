"""Checkpoints of the PyTorch world, in and out: one name table per model family, read in both directions."""
