"""The command line ``blt``: commands that the core and plugins register as entry points.

Bytes and results go to stdout, everything else to stderr. Exit codes: 0 done, 1 a run failed or
was interrupted, 2 bad input.
"""

from blt_core.cli.app import main

__all__ = ["main"]
