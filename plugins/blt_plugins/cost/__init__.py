"""Cost models, and ``blt cost``."""
