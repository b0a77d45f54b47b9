"""Unmasking rules: which masked bytes of a block to fill next."""
