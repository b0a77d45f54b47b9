"""Work in a thread that ends early once nobody waits for its result."""

from __future__ import annotations

import threading
from contextvars import ContextVar

from blt_core.errors import RunError

_END: ContextVar[threading.Event] = ContextVar("end")


class UnwantedError(RunError):
    """Nobody waits for the result."""


def can_end(end: threading.Event) -> None:
    """Let this thread's work end once ``end`` is set."""
    _END.set(end)


def check_wanted() -> None:
    """Raise UnwantedError in a thread whose work is to end."""
    end = _END.get(None)
    if end is not None and end.is_set():
        raise UnwantedError("it was ended before it was done")
