"""Measurements against the clock: the training step beside torch, over devices, and the input pipeline."""
