"""Ctrl-C and SIGTERM: a request to stop where a run can go on, or an end at once."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType

from blt_core.errors import RunError


class Stopped(Exception):  # noqa: N818 -- a request, no error
    """Ends work between two batches, in all processes at the same one."""


class Interrupts:
    """Turns signals into the flag ``asked`` while entered; a second Ctrl-C stops at once.

    Launchers forward a SIGTERM after Ctrl-C, so a second signal of that kind must not abort the
    save; schedulers that insist send SIGKILL.
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


@contextmanager
def stopped_at_once(then: str) -> Iterator[None]:
    """Raise RunError wherever the block is when Ctrl-C or SIGTERM comes.

    For work that has nothing in memory worth saving. then: what the user can do now.
    """
    main = threading.current_thread() is threading.main_thread()
    former = signal.signal(signal.SIGTERM, _press) if main else None
    try:
        yield
    except KeyboardInterrupt:
        raise RunError(f"interrupted; {then}") from None
    finally:
        if main:
            signal.signal(signal.SIGTERM, former)


def _press(_number: int, _frame: FrameType | None) -> None:
    # Handlers of Exception, of which libraries have many, let it through.
    raise KeyboardInterrupt
