"""Corpora: where documents come from, and which of them are held out."""
