"""Scores: one small file per metric or picture, and `run`, which asks the questions."""
