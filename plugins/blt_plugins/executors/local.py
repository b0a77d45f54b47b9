"""The component ``local``: workers are processes of this machine."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import Connection
from multiprocessing.connection import wait as wait_for
from typing import Any

import attrs
import torch

from blt_core.component import BuildContext, Component, at_least
from blt_core.errors import RunError
from blt_core.execution import Here, Outcome, Start, Tell, Work, Workers, torch_threads

#: Seconds between two looks at how far the workers are.
GLANCE = 0.2
#: Tasks that are with a worker, or wait for it, so that none is idle.
AHEAD = 2


@attrs.frozen(kw_only=True)
class LocalParams:
    """workers: processes; with 1, this process does the work. threads: of torch, in each.

    retries: how often a task is done again whose worker has died, as where memory runs out.
    """

    workers: int = attrs.field(default=1, validator=at_least(1))
    threads: int = attrs.field(default=1, validator=at_least(1))
    retries: int = attrs.field(default=2, validator=at_least(0))


class LocalExecutor:
    """Fulfils :class:`blt_core.execution.Executor`."""

    def __init__(self, params: LocalParams, context: BuildContext) -> None:
        self._params = params
        self.threads = params.threads

    @contextlib.contextmanager
    def start(self, make: Start) -> Iterator[Workers]:
        """Workers, which end with this process, however that ends."""
        if self._params.workers == 1:
            with torch_threads(self.threads):
                yield Here(make)
            return
        workers = _Processes(self._params, make)
        try:
            yield workers
        finally:
            workers.close()


class _Processes:
    """A pool of processes, which is made anew when one of them has died."""

    def __init__(self, params: LocalParams, make: Start) -> None:
        self._params, self._make = params, make
        self._context = multiprocessing.get_context("spawn")
        self._others = set(multiprocessing.active_children())
        # No lock, which a worker might take with it when it is killed: short writes are whole.
        self._told, self._tells = self._context.Pipe(duplex=False)
        self._pool: ProcessPoolExecutor | None = None

    def run(self, tasks: Iterable[Any], watch: Tell | None = None) -> Iterator[tuple[int, Any]]:
        """As the protocol has it. Raises RunError when workers die too often."""
        left, again = enumerate(tasks), deque[tuple[int, Any]]()
        under_way: dict[Future[Outcome], tuple[int, Any]] = {}
        deaths: Counter[int] = Counter()
        try:
            while True:
                lost = self._fill(under_way, again, left)
                if not under_way and not lost:
                    return
                done, _ = wait(under_way, GLANCE, FIRST_COMPLETED)
                self._tell(watch)
                for future in done:
                    number, task = under_way.pop(future)
                    try:
                        outcome = future.result()
                    except BrokenProcessPool:
                        lost.append((number, task))
                    else:
                        yield number, outcome.take()
                if lost:
                    lost += under_way.values()
                    under_way.clear()
                    self._end()
                    again.extendleft(reversed(lost))
                    deaths.update(number for number, _ in lost)
                    self._check(deaths)
        finally:
            for future in under_way:
                future.cancel()

    def _check(self, deaths: Counter[int]) -> None:
        """Raise RunError if the worker of one task has died too often; ``deaths``, by task."""
        if max(deaths.values()) > self._params.retries:
            raise RunError(
                f"a worker process has ended before its time, {max(deaths.values())} times; what "
                "was finished is kept, and the same command goes on\n"
                "  fix: if memory ran out, use fewer workers"
            )

    def _fill(
        self,
        under_way: dict[Future[Outcome], tuple[int, Any]],
        again: deque[tuple[int, Any]],
        left: Iterator[tuple[int, Any]],
    ) -> list[tuple[int, Any]]:
        """Hand out tasks as long as there are any and workers want them.

        Gives a task that could not be handed out, for a worker has died meanwhile.
        """
        while len(under_way) < AHEAD * self._params.workers:
            number, task = again.popleft() if again else next(left, (None, None))
            if number is None:
                break
            try:
                under_way[self._started().submit(_work, task)] = number, task
            except BrokenProcessPool:
                return [(number, task)]
        return []

    def _started(self) -> ProcessPoolExecutor:
        if self._pool is None:
            start = (self._make, self._params.threads, self._tells)
            self._pool = ProcessPoolExecutor(
                self._params.workers, self._context, _start_worker, start
            )
        return self._pool

    def _tell(self, watch: Tell | None) -> None:
        told = 0
        while self._told.poll():
            told += int.from_bytes(self._told.recv_bytes(), "big")
        if watch is not None and told:
            watch(told)

    def close(self) -> None:
        """End the processes, and what they tell by."""
        self._end()
        self._told.close()
        self._tells.close()

    def _end(self) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)
            ours = set(multiprocessing.active_children()) - self._others
            for process in ours:
                process.terminate()
            for process in ours:
                process.join()
            self._pool = None


# -- in a worker ---------------------------------------------------------------------------------

_worker: _Worker


class _Worker:
    """What a process does; work is made for the first task, whose outcome says if that fails."""

    def __init__(self, make: Start, tells: Connection) -> None:
        self._make, self._tells = make, tells
        self._work: Work | None = None

    def __call__(self, task: Any) -> Outcome:
        return Outcome.of(self._do, task)

    def _do(self, task: Any) -> Any:
        if self._work is None:
            self._work = self._make(self._tell)
        return self._work(task)

    def _tell(self, amount: int) -> None:
        self._tells.send_bytes(amount.to_bytes(8, "big"))


def _start_worker(make: Start, threads: int, tells: Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the first process sees to it
    _end_with_parent()
    torch.set_num_threads(threads)
    global _worker  # noqa: PLW0603 -- how an initializer hands on what it made
    _worker = _Worker(make, tells)


def _work(task: Any) -> Outcome:
    return _worker(task)


def _end_with_parent() -> None:
    """End this process when its parent has ended, even by SIGKILL, since no work will come."""
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def watch() -> None:
        wait_for([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


LOCAL = Component(
    kind="executor",
    name="local",
    factory=LocalExecutor,
    params=LocalParams,
    summary="processes of this machine",
)
