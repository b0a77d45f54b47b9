"""The progress of commands that take a while, on stderr: a bar, or lines off a terminal."""

from __future__ import annotations

import contextlib
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from blt_core.errors import RunError

if TYPE_CHECKING:
    from rich.progress import Progress

    from blt_core.batch_inference import Outcome


#: Seconds over which the speed of a bar is measured: batches may be minutes apart.
SPEED_SECONDS = 600.0
#: Seconds between two lines at first.
LINE_SECONDS = 30.0
#: Seconds between two lines at most.
MOST_SECONDS = 300.0
#: In between, a pause is this part of what has passed.
SHARE = 20
#: Lines back to which the speed of the next one is measured.
LINES = 6
#: Seconds within which what is told at first was there before, as a run that goes on finds it.
KEPT_SECONDS = 1.0


def progress_bar(clock: Callable[[], float] = time.monotonic) -> Progress:
    """A bar that is gone when its ``with`` block ends; in a log, a line now and then."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    class Lines(Bar):
        """Writes lines in place of a bar."""

        def update(self, task_id: Any, **fields: Any) -> None:
            super().update(task_id, **fields)
            self._tell(task_id)

        def advance(self, task_id: Any, advance: float = 1) -> None:
            super().advance(task_id, advance)
            self._tell(task_id)

        def _tell(self, task_id: Any) -> None:
            task = self._tasks.get(task_id)
            if task is None or task.total is None:
                return
            begun = lines.setdefault(task_id, Line(task.start_time or clock()))
            line = begun.at(clock(), task.completed, task.total)
            if line is not None:
                print(f"{task.description}: {line}", file=sys.stderr, flush=True)  # noqa: T201

    lines: dict[Any, Line] = {}
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn())
    return (Bar if console.is_terminal else Lines)(
        *columns,
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
        speed_estimate_period=SPEED_SECONDS,
        get_time=clock,
    )


class Line:
    """How far something has come, as a line that is due now and then.

    The speed is that of the last few lines, so that what was there before is soon forgotten.
    """

    def __init__(self, began: float) -> None:
        self._began = began
        self._told = deque([(began, 0.0)], maxlen=LINES)

    def at(self, now: float, done: float, total: float) -> str | None:
        """The line, if one is due: done, in all, how many a second, and the time left."""
        passed = now - self._began
        if passed < KEPT_SECONDS:
            self._told[0] = (now, done)
        pause = min(max(LINE_SECONDS, passed / SHARE), MOST_SECONDS)
        if now - self._told[-1][0] < pause:
            return None
        (since, before), share = self._told[0], done / total if total else 1.0
        speed = (done - before) / (now - since)
        self._told.append((now, done))
        left = f"{timedelta(seconds=round((total - done) / speed))} left" if speed > 0 else "–"
        return f"{done:,.0f} of {total:,.0f} ({share:.1%}), {speed:.3g}/s, {left}"


@contextlib.contextmanager
def item_progress(what: str, output: Path) -> Iterator[Callable[[int, int], None]]:
    """Of items whose records go to ``output``; call what it gives with (items done, items in all).

    A Ctrl-C, or SIGTERM, within raises RunError, which says how to go on.
    """
    with progress_bar() as bar:
        task = bar.add_task(what, total=None)
        try:
            yield lambda done, total: bar.update(task, completed=done, total=total)
        except KeyboardInterrupt:
            raise RunError(
                f"interrupted; what is done is kept in {output}.partial: run the same command "
                "again to go on"
            ) from None


def report_items(outcome: Outcome, output: Path) -> None:
    """Say on stderr what a file of items gave; RunError if some of them could not be served."""
    each = f"{outcome.items:,} items in {outcome.seconds:,.1f} s"
    print(f"[{each}, {outcome.failed:,} failed]", file=sys.stderr)  # noqa: T201 -- no result
    if outcome.failed:
        raise RunError(
            f"{output}: {outcome.failed:,} of {outcome.items:,} items have an error in place of a "
            f"result\n  the first: {outcome.first}"
        )
