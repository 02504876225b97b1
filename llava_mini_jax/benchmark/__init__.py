"""Measurements: training and asking beside torch and LLaVA-v1.5, devices, input, sessions, memory, a loaded server."""
