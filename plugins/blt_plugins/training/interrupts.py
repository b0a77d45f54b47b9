"""Ctrl-C and SIGTERM as a request to stop after the step, not in the middle of it."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType


class Interrupts:
    """While it is entered, ``asked`` tells whether a signal came; a second Ctrl-C stops at once.

    SIGTERM never does: launchers send it after a Ctrl-C that has reached the process already, and
    whoever must have the process gone sends SIGKILL next.
    """

    def __init__(self, note: Callable[[str], None]) -> None:
        self.asked = False
        self._note = note
        self._pressed = False
        self._former: dict[int, object] = {}

    def __enter__(self) -> None:
        # Only the main thread may handle signals; whoever runs this in another one stops it.
        if threading.current_thread() is threading.main_thread():
            numbers = (signal.SIGINT, signal.SIGTERM)
            self._former = {number: signal.signal(number, self._ask) for number in numbers}

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _ask(self, number: int, _frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            if self._pressed:
                raise KeyboardInterrupt
            self._pressed = True
        if not self.asked:
            self.asked = True
            self._note(f"{signal.Signals(number).name}: stopping after this step")
