"""Logging: events go to stderr. The library never configures structlog; the command line does."""

from __future__ import annotations

import logging
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import structlog


def logger() -> structlog.typing.FilteringBoundLogger:
    """A logger that writes to stderr, for a library's output must not mix with its user's.

    Made anew for each event, of which there are few: stderr may have been replaced since.
    """
    import structlog

    bound: structlog.typing.FilteringBoundLogger = structlog.wrap_logger(
        structlog.PrintLogger(sys.stderr)
    )
    return bound


def configure(*, verbose: bool = False) -> None:
    """Show warnings and errors, or everything if ``verbose``."""
    import structlog

    level = logging.DEBUG if verbose else logging.WARNING
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.dev.ConsoleRenderer(
                colors=sys.stderr is not None and sys.stderr.isatty(),
                exception_formatter=structlog.dev.plain_traceback,
            ),
        ],
        # Whoever asks structlog for a logger gets one that leaves stdout alone.
        logger_factory=lambda *_: structlog.PrintLogger(sys.stderr),
        wrapper_class=structlog.make_filtering_bound_logger(level),
        cache_logger_on_first_use=False,
    )
