"""The progress bar of commands that take a while; on stderr, and only on a terminal."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from blt_core.errors import RunError

if TYPE_CHECKING:
    from rich.progress import Progress

    from blt_core.batch_inference import Outcome


def progress_bar() -> Progress:
    """A bar that is gone when its ``with`` block ends."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn())
    console = Console(stderr=True)
    return Bar(
        *columns,
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )


@contextlib.contextmanager
def item_progress(what: str) -> Iterator[Callable[[int, int], None]]:
    """A bar of items; call what it gives with (items done, items in all)."""
    with progress_bar() as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def report_items(outcome: Outcome, output: Path) -> None:
    """Say on stderr what a file of items gave; RunError if some of them could not be served."""
    each = f"{outcome.items:,} items in {outcome.seconds:,.1f} s"
    print(f"[{each}, {outcome.failed:,} failed]", file=sys.stderr)  # noqa: T201 -- no result
    if outcome.failed:
        raise RunError(
            f"{output}: {outcome.failed:,} of {outcome.items:,} items have an error in place of a "
            f"result\n  the first: {outcome.first}"
        )
