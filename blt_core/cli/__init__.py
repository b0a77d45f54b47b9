"""The command line ``blt``: commands of the core, and those that plugins add.

Bytes and results go to stdout, everything else to stderr. Exit codes: 0 done, 1 a run failed or
was interrupted, 2 bad input.
"""

from blt_core.cli.app import main

__all__ = ["main"]
