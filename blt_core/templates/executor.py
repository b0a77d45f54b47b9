"""An executor: threads of this process.

Change ``Threads.start`` and ``ThreadWorkers.run``. Results are given as they end, each with the
number of its task; no more tasks are taken than workers want; an error of a task is raised.

Try it:    blt plugins test executor acme/name
Contracts: docs/kinds/executor.md
"""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Any

import attrs

from blt_core import BuildContext, Component, at_least, hookimpl
from blt_core.execution import Start, Tell, Work, torch_threads

#: What configs call the component.
NAME = "acme/name"


@attrs.frozen(kw_only=True)
class ThreadsParams:
    """workers: tasks at a time. threads: of torch, for all of them."""

    workers: int = attrs.field(default=2, validator=at_least(1))
    threads: int = attrs.field(default=1, validator=at_least(1))


class Threads:
    """Each thread makes its work for the first task that it gets."""

    def __init__(self, params: ThreadsParams, context: BuildContext) -> None:
        self.workers, self.threads = params.workers, params.threads

    @contextlib.contextmanager
    def start(self, make: Start) -> Iterator[ThreadWorkers]:
        """The workers; their threads end with the block."""
        with torch_threads(self.threads), ThreadPoolExecutor(self.workers) as pool:
            yield ThreadWorkers(pool, self.workers, make)


class ThreadWorkers:
    """What ``start`` gives."""

    def __init__(self, pool: ThreadPoolExecutor, workers: int, make: Start) -> None:
        self.pool, self.workers, self.make = pool, workers, make
        self.own, self.told = threading.local(), queue.SimpleQueue[int]()

    def run(self, tasks: Iterable[Any], watch: Tell | None = None) -> Iterator[tuple[int, Any]]:
        """The number and the result of each task, as they end."""
        left = enumerate(tasks)
        under_way: dict[Future[Any], int] = {}
        while True:
            while len(under_way) < self.workers and (one := next(left, None)) is not None:
                number, task = one
                under_way[self.pool.submit(self._do, task)] = number
            if not under_way:
                break
            for done in wait(under_way, return_when=FIRST_COMPLETED).done:
                number = under_way.pop(done)
                result = done.result()
                self._hand_on(watch)
                yield number, result

    def _do(self, task: Any) -> Any:
        work: Callable[[Any], Any] | None = getattr(self.own, "work", None)
        if work is None:
            work = self.own.work = self._made()
        return work(task)

    def _made(self) -> Work:
        return self.make(self.told.put)

    def _hand_on(self, watch: Tell | None) -> None:
        while not self.told.empty():
            amount = self.told.get()
            if watch is not None:
                watch(amount)


@hookimpl
def blt_components() -> list[Component]:
    """The executor."""
    return [Component("executor", NAME, Threads, ThreadsParams, "threads of this process")]
