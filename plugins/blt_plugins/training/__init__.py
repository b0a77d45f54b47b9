"""Training: corpus, objective, backend, and the loop behind ``blt train``."""
