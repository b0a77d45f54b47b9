"""Formats that models are stored in."""
