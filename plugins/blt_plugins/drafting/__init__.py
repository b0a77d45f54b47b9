"""Drafters of verified samplers."""
