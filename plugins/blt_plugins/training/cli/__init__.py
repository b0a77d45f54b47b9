"""The commands ``blt train``, ``evaluate``, ``calibrate`` and ``prepare``."""
