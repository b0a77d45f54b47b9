"""Samplers and their presets."""
