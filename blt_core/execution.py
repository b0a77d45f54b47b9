"""The kind ``executor``: where the tasks of one kind of work are done, and by how many workers.

Work is a function that each worker makes once, since a model is long in loading, and tasks that it
is called with. Any worker may do any task, so nothing that a task gives may depend on which ones
came before it; then results are the same with any executor.

>>> with executor.start(make) as workers:  # doctest: +SKIP
...     for number, result in workers.run(tasks):
...         ...
"""

from __future__ import annotations

import contextlib
import os
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from typing import Any, Generic, Protocol, TypeVar, runtime_checkable

import attrs
import torch

from blt_core.errors import (
    BltError,
    CheckpointError,
    ComponentError,
    DataError,
    PluginError,
    RequestError,
    RunError,
)
from blt_core.faults import naming

T = TypeVar("T")
#: Told how much of a task is done, in a unit of the work's own, such as bytes.
Tell = Callable[[int], None]
#: What a worker does with a task.
Work = Callable[[Any], Any]
#: Makes it, in the worker: it is sent there by pickle, as tasks and results are.
Start = Callable[[Tell], Work]


@runtime_checkable
class Workers(Protocol):
    """Workers that have started; those of an executor, or :class:`Here`."""

    def run(self, tasks: Iterable[Any], watch: Tell | None = None) -> Iterator[tuple[int, Any]]:
        """(number, result) of each task, counted from 0, as they end.

        Tasks are taken as workers become free, so that there may be any number of them. watch:
        called now and then, in the caller's thread, with what was told since; by the end, with all
        that finished tasks told. What a task raises is raised here, and ends the run.
        """
        ...


@runtime_checkable
class Executor(Protocol):
    """The contract of the kind ``executor``.

    threads: of torch, in each worker: with another number, sums of floating-point numbers are
    others in their last digits.
    """

    threads: int

    def start(self, make: Start) -> AbstractContextManager[Workers]:
        """Workers, as a context manager; when it is left none of them lives.

        ``make`` is called once in a worker, before its first task. A task whose worker dies is done
        again by another one.
        """
        ...


def threads_of(executor: Executor | None) -> int:
    """Of torch, where the tasks of an executor are done; without one, those of this process."""
    return torch.get_num_threads() if executor is None else executor.threads


class Here:
    """The only worker is this process, whose work tells at once. Fulfils :class:`Workers`."""

    def __init__(self, make: Start) -> None:
        self._watch: Tell | None = None
        self._work = make(self._tell)

    def _tell(self, amount: int) -> None:
        if self._watch is not None:
            self._watch(amount)

    def run(self, tasks: Iterable[Any], watch: Tell | None = None) -> Iterator[tuple[int, Any]]:
        """Do each task when the result of the one before it was taken."""
        self._watch = watch
        for number, task in enumerate(tasks):
            yield number, self._work(task)


def _here() -> tuple[int, int]:
    return os.getpid(), threading.get_ident()


class AtHand(Generic[T]):
    """Something of this thread, for work that is made here; it travels to no other one."""

    def __init__(self, value: T | None) -> None:
        self._value, self._home = value, _here()

    @property
    def value(self) -> T | None:
        """None in another process, or thread, which makes its own."""
        return self._value if self._home == _here() else None

    def __reduce__(self) -> tuple[type[AtHand[T]], tuple[None]]:
        return type(self), (None,)


@contextlib.contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """So many threads for torch within."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class WorkError(Exception):
    """An error in a worker that is none of ours, and so a fault of a program: its traceback."""


@attrs.frozen
class Outcome:
    """What became of a task in a worker, in a form that travels: a result, or an error.

    error: one of ours. fault: the traceback of any other. told: the sum of what the task told,
    where that does not travel by itself.
    """

    result: Any = None
    error: BltError | None = None
    fault: str = ""
    told: int = 0

    @classmethod
    def of(cls, work: Work, task: Any) -> Outcome:
        """Do a task. An error names the component that it comes from, as it would here."""
        try:
            with naming():
                return cls(work(task))
        except BltError as error:
            return cls(error=_portable(error))
        except Exception:  # noqa: BLE001 -- raised where the result is asked for
            return cls(fault=traceback.format_exc())

    def take(self) -> Any:
        """The result; raises the error, or WorkError."""
        if self.error is not None:
            raise self.error
        if self.fault:
            raise WorkError(f"in a worker:\n{self.fault}")
        return self.result


def _portable(error: BltError) -> BltError:
    """The error, or one of its kind that can be unpickled: a plugin's may not know how."""
    if type(error).__module__ == BltError.__module__:
        return error
    return next(kind for kind in _KINDS if isinstance(error, kind))(str(error))


#: What an error becomes whose class is not of blt_core.errors: the first that it is one of.
_KINDS: tuple[type[BltError], ...] = (
    *(ComponentError, PluginError, CheckpointError, DataError, RequestError, RunError, BltError),
)


def check_torch(version: str) -> None:
    """Raise RunError where torch is not the version of the process that a worker works for."""
    if torch.__version__ != version:
        raise RunError(
            f"a worker has torch {torch.__version__}, the process that it works for {version}\n"
            "  fix: install the same packages on all machines"
        )
