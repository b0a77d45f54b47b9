"""What a training run tells: a progress bar on a terminal, else a line now and then."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from typing import Protocol, TextIO

import attrs
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

#: Seconds between two lines where there is no terminal.
LINE_SECONDS = 20.0


class Report(Protocol):
    """Receives the progress of a run. ``figures``: loss, lr, grad_norm, bytes_per_second."""

    def phase(self, name: str, step: int, steps: int) -> None:
        """A phase begins, or goes on, at ``step``."""
        ...

    def step(self, step: int, figures: Mapping[str, float]) -> None:
        """Step ``step`` (from 1) is done."""
        ...

    def note(self, text: str) -> None:
        """Say something once."""
        ...

    def close(self) -> None:
        """No more will come."""
        ...


def new_report(stream: TextIO = sys.stderr) -> Report:
    """A bar if ``stream`` is a terminal, else lines."""
    return BarReport(stream) if stream.isatty() else LineReport(stream)


@attrs.frozen
class TrainStep:
    """What observers are told of an optimizer step. ``figures`` as in :class:`Report`."""

    phase: str
    step: int
    figures: Mapping[str, float]


class ObservedReport:
    """Passes everything on, and tells the plugins that observe runs (``notify``) of each step."""

    def __init__(self, inner: Report, notify: Callable[..., None], run: object) -> None:
        self._inner, self._notify, self._run, self._phase = inner, notify, run, ""

    def phase(self, name: str, step: int, steps: int) -> None:
        """A phase begins, or goes on, at ``step``."""
        self._phase = name
        self._inner.phase(name, step, steps)

    def step(self, step: int, figures: Mapping[str, float]) -> None:
        """Step ``step`` (from 1) is done."""
        self._notify("blt_run_step", run=self._run, step=TrainStep(self._phase, step, figures))
        self._inner.step(step, figures)

    def note(self, text: str) -> None:
        """Say something once."""
        self._inner.note(text)

    def close(self) -> None:
        """No more will come."""
        self._inner.close()


class SilentReport:
    """Tells nothing: for the processes beside the first."""

    def phase(self, name: str, step: int, steps: int) -> None:
        """Nothing is told."""

    def step(self, step: int, figures: Mapping[str, float]) -> None:
        """Nothing is told."""

    def note(self, text: str) -> None:
        """Nothing is told."""

    def close(self) -> None:
        """Nothing is open."""


class LineReport:
    """A line for the first and last step of a phase and every ``seconds``."""

    def __init__(self, stream: TextIO, seconds: float = LINE_SECONDS) -> None:
        self._stream, self._seconds = stream, seconds
        self._name, self._first, self._steps = "", 0, 0
        self._began = self._last = 0.0

    def phase(self, name: str, step: int, steps: int) -> None:
        """A phase begins, or goes on, at ``step``."""
        self._name, self._first, self._steps = name, step, steps
        self._began, self._last = time.monotonic(), float("-inf")

    def step(self, step: int, figures: Mapping[str, float]) -> None:
        """Step ``step`` (from 1) is done."""
        now = time.monotonic()
        if step < self._steps and now - self._last < self._seconds:
            return
        self._last = now
        left = (now - self._began) / max(step - self._first, 1) * (self._steps - step)
        self.note(f"{self._name} {step}/{self._steps}  {describe(figures)}  left {_clock(left)}")

    def note(self, text: str) -> None:
        """Say something once."""
        print(f"{time.strftime('%H:%M:%S')} {text}", file=self._stream, flush=True)

    def close(self) -> None:
        """Nothing is open."""


class BarReport:
    """A rich progress bar."""

    def __init__(self, stream: TextIO) -> None:
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.completed:.0f}/{task.total:.0f}  {task.fields[figures]}"),
            TimeRemainingColumn(),
            console=Console(file=stream),
        )
        self._task: TaskID | None = None
        self._progress.start()

    def phase(self, name: str, step: int, steps: int) -> None:
        """A phase begins, or goes on, at ``step``."""
        self._task = self._progress.add_task(name, total=steps, completed=step, figures="")

    def step(self, step: int, figures: Mapping[str, float]) -> None:
        """Step ``step`` (from 1) is done."""
        if self._task is not None:
            self._progress.update(self._task, completed=step, figures=describe(figures))

    def note(self, text: str) -> None:
        """Print above the bar."""
        self._progress.console.print(text, markup=False, highlight=False)

    def close(self) -> None:
        """Leave the terminal as it was."""
        self._progress.stop()


def describe(figures: Mapping[str, float]) -> str:
    """The figures of a step on one line."""
    speed = figures["bytes_per_second"] / 1000
    return (
        f"loss {figures['loss']:.4f}  lr {figures['lr']:.2e}  "
        f"norm {figures['grad_norm']:.2f}  {speed:.2f} kB/s"
    )


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"
