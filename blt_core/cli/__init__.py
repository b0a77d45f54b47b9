"""The command line ``blt``: commands that the core and plugins register as entry points.

Bytes and results go to stdout, everything else to stderr. Exit codes: 0 done, 1 a run failed or
was interrupted, 2 bad input. Commands write results with ``output``, ``output_json`` or
``console``.
"""

from blt_core.cli.app import main
from blt_core.cli.streams import console, output, output_json

__all__ = ["console", "main", "output", "output_json"]
