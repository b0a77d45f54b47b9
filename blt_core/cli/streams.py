"""Where the results of a command go, and where everything else goes.

stdout is for results alone: what a command writes with :func:`output`, :func:`output_json`,
:func:`console` or ``typer.echo``. While a command line runs, all else that is written to stdout (a
plugin's ``print``, a logger, C code, a process that inherits it) goes to stderr. A library does
none of this: only the command line calls :func:`take_over` and :func:`claimed`.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, TextIO, cast

from blt_core.files import to_json

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer
    from rich.console import Console

#: Packages whose ``echo`` writes results; newer versions of typer bring a click of their own.
_ECHOING = ("typer", "click")


class ReaderGone(BaseException):
    """Whoever read stdout has closed it (``blt plugins | head -1``): stop, and say nothing.

    No error, and nothing that a handler of errors may take for one.
    """


class StdoutClosed(Exception):  # noqa: N818 -- says what is wrong
    """There is no stdout (``blt cost >&-``), so results would be lost."""


# -- for commands ----------------------------------------------------------------------------------


def output(result: str | bytes = "") -> None:
    """Write a result to stdout, at once: a text and a line feed, or bytes as they are.

    Raises ReaderGone where nobody reads any more, which ends the command with exit code 0.
    """
    stream = results()
    if isinstance(result, str):
        stream.write(result + "\n")
    elif hasattr(stream, "buffer"):
        stream.flush()
        stream.buffer.write(result)
        stream.buffer.flush()
    else:  # a program has put a stream of text there
        stream.write(result.decode("utf-8", errors="replace"))
    stream.flush()


def output_json(record: object) -> None:
    """Write one line of JSON. Floats that JSON cannot spell (NaN, infinity) become ``null``."""
    output(to_json(record))


def console(width: int) -> Console:
    """A rich console that writes results, text as it is; ``width``: where it is no terminal."""
    from rich.console import Console

    stream = results()
    shown = Console(file=stream, markup=False, emoji=False, highlight=False)
    if not shown.is_terminal:
        shown.width = width
    elif "COLUMNS" not in os.environ:
        # rich would ask the other standard streams, which may lead elsewhere.
        with contextlib.suppress(OSError, ValueError):
            shown.width = os.get_terminal_size(stream.fileno()).columns or width
    return shown


def results() -> TextIO:
    """The stream that results go to; ``sys.stdout`` in a program that runs no command line."""
    return sys.stdout if _claim is None else _claim.results


# -- for the command line --------------------------------------------------------------------------


def take_over() -> None:
    """Keep stdout for results until the process ends, whoever else writes to descriptor 1.

    stderr is made one that never fails. Raises StdoutClosed if there is no stdout.
    """
    absent, encoding = sys.stdout is None, getattr(sys.stdout, "encoding", "utf-8")
    sys.stderr = _lenient_stderr()
    if absent:
        raise StdoutClosed
    sys.stdout.flush()
    kept = _Results(_copy(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    # Nothing is held back, so nothing can be lost, or fail, when the interpreter ends.
    stream = io.TextIOWrapper(kept, encoding=encoding, errors="replace", write_through=True)
    _set_claim(_Printed(stream))


@contextlib.contextmanager
def claimed() -> Iterator[None]:
    """Within, what is ``sys.stdout`` now is for results, as far as Python code is concerned."""
    if _claim is not None:
        yield
        return
    before = sys.stdout
    _set_claim(_Printed(before))
    try:
        yield
    finally:
        sys.stdout = before
        _set_claim(None)


class _Printed(io.TextIOBase):
    """``sys.stdout`` while a command runs: ``typer.echo`` writes results, all others to stderr."""

    def __init__(self, results: TextIO) -> None:
        self.results = results

    def write(self, text: str, /) -> int:
        return self._stream().write(text)

    def flush(self) -> None:
        self.results.flush()
        sys.stderr.flush()

    def isatty(self) -> bool:
        return self._stream().isatty()

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return sys.stderr.fileno()

    @property
    def buffer(self) -> Any:
        return self._stream().buffer

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return self.results.encoding

    def __getattr__(self, name: str) -> Any:  # reconfigure, line_buffering, …
        return getattr(sys.stderr, name)

    def _stream(self) -> TextIO:
        """Where the caller of the method that asks writes to."""
        caller = sys._getframe(1).f_back  # noqa: SLF001 -- who writes decides
        name = caller.f_globals.get("__name__", "") if caller else ""
        return self.results if name.partition(".")[0] in _ECHOING else sys.stderr


_claim: _Printed | None = None


def _set_claim(printed: _Printed | None) -> None:
    global _claim  # noqa: PLW0603 -- a process has one stdout
    _claim = printed
    if printed is not None:
        sys.stdout = cast("TextIO", printed)


class _Whole(io.FileIO):
    """A descriptor, unbuffered, that takes all of a write or fails."""

    def write(self, data: ReadableBuffer, /) -> int:
        left = memoryview(data).cast("B")
        size = len(left)
        while left:
            count = super().write(left)
            if count is None:
                raise BlockingIOError("the stream takes nothing now")
            left = left[count:]
        return size


class _Results(_Whole):
    def write(self, data: ReadableBuffer, /) -> int:
        try:
            return super().write(data)
        except BrokenPipeError as error:
            raise ReaderGone from error


class _Notes(_Whole):
    """Notes that nobody can read are no reason to stop."""

    def write(self, data: ReadableBuffer, /) -> int:
        with contextlib.suppress(OSError):
            super().write(data)
        return memoryview(data).nbytes


def _lenient_stderr() -> TextIO:
    """stderr, whose failures are ignored; one that leads nowhere if it is closed."""
    encoding = getattr(sys.stderr, "encoding", "utf-8")
    if sys.stderr is None:
        _open_nowhere(2)
        descriptor = 2
    else:
        sys.stderr.flush()
        descriptor = sys.stderr.fileno()
    notes = _Notes(descriptor, "wb", closefd=False)
    errors = "backslashreplace"  # as Python's own: names of files may be no text
    return io.TextIOWrapper(notes, encoding=encoding, errors=errors, line_buffering=True)


def _open_nowhere(descriptor: int) -> None:
    opened = os.open(os.devnull, os.O_WRONLY)
    if opened != descriptor:
        os.dup2(opened, descriptor)
        os.close(opened)
    os.set_inheritable(descriptor, True)


def _copy(descriptor: int) -> int:
    """A copy that is none of the standard descriptors, even where one of these is closed."""
    copies = [os.dup(descriptor)]
    while copies[-1] <= 2:  # noqa: PLR2004 -- stdin, stdout, stderr
        copies.append(os.dup(descriptor))
    for spare in copies[:-1]:
        os.close(spare)
    return copies[-1]
