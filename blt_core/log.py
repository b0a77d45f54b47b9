"""Logging: events go to stderr. The library never configures structlog; the command line does."""

from __future__ import annotations

import importlib.util
import logging
import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
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
    """Show warnings and errors, or everything if ``verbose``.

    structlog itself is configured when somebody imports it: that takes a third of ``blt --help``.
    """
    level = logging.DEBUG if verbose else logging.WARNING
    sys.meta_path[:] = [each for each in sys.meta_path if not isinstance(each, _Awaited)]
    if "structlog" in sys.modules:
        _configure(level)
    else:
        sys.meta_path.insert(0, _Awaited("structlog", lambda: _configure(level)))


class _Awaited(MetaPathFinder):
    """Calls ``then`` once a module has been imported, whoever imports it."""

    def __init__(self, name: str, then: Callable[[], None]) -> None:
        self._name, self._then = name, then

    def find_spec(
        self, name: str, _path: Sequence[str] | None = None, _target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The spec that others find, with a loader that calls ``then`` afterwards."""
        if name != self._name or self not in sys.meta_path:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                self._then()

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def _configure(level: int) -> None:
    import structlog

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
