"""Verifications of drafts."""
