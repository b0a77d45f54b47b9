"""Checkpoints in the format of transformers."""
