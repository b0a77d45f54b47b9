"""Patchers and byte scorers."""
