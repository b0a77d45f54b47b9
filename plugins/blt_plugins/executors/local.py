"""The component ``local``: workers are processes of this machine."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
import traceback
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from multiprocessing.connection import Connection
from multiprocessing.connection import wait as wait_for
from multiprocessing.process import BaseProcess
from typing import Any

import attrs
import torch

from blt_core.component import BuildContext, Component, at_least
from blt_core.errors import RunError
from blt_core.execution import Here, Outcome, Start, Tell, Work, Workers, torch_threads

#: Seconds that a process has to end by itself.
PATIENCE = 10.0
#: A task with its number.
Numbered = tuple[int, Any]


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
    """Processes, each at the other end of a pipe of its own; one that has died is replaced."""

    def __init__(self, params: LocalParams, make: Start) -> None:
        self._params, self._make = params, make
        self._workers: list[_Worker] = []

    def run(self, tasks: Iterable[Any], watch: Tell | None = None) -> Iterator[tuple[int, Any]]:
        """As the protocol has it. Raises RunError when the workers of a task die too often."""
        left, again = enumerate(tasks), deque[Numbered]()
        deaths: Counter[int] = Counter()
        try:
            while busy := self._busy(again, left):
                for pipe in wait_for(list(busy)):
                    worker = busy[pipe]
                    try:
                        found = worker.pipe.recv()
                    except (EOFError, OSError):
                        again.append(self._buried(worker, deaths))
                        continue
                    worker.has_worked = True
                    if isinstance(found, Outcome):
                        number, _ = worker.take()
                        yield number, found.take()
                    elif watch is not None:
                        watch(found)
        finally:  # nobody would take what those are at
            for worker in [each for each in self._workers if each.task is not None]:
                self._end(worker)

    def _busy(self, again: deque[Numbered], left: Iterator[Numbered]) -> dict[Any, _Worker]:
        """Hand out tasks, as long as there are any and workers for them; the workers, by pipe."""
        idle = [each for each in self._workers if each.task is None]
        while idle or len(self._workers) < self._params.workers:
            task = again.popleft() if again else next(left, None)
            if task is None:
                break
            if not idle:
                idle.append(_Worker.started(self._make, self._params.threads))
                self._workers.append(idle[-1])
            idle.pop().give(task)
        return {each.pipe: each for each in self._workers if each.task is not None}

    def _buried(self, worker: _Worker, deaths: Counter[int]) -> Numbered:
        """The task of a worker that has died. Raises RunError if it was not the first."""
        number, task = worker.take()
        self._end(worker)
        deaths[number] += 1
        if deaths[number] > self._params.retries:
            fix = "if memory ran out, use fewer workers"
            if not worker.has_worked:
                fix += '; a program must start under `if __name__ == "__main__":`'
            raise RunError(
                "a worker process has ended before its time, at a task that was begun "
                f"{deaths[number]} × in all; what was finished is kept, and the same command goes "
                f"on\n  fix: {fix}"
            )
        return number, task

    def _end(self, worker: _Worker) -> None:
        self._workers.remove(worker)
        worker.end()

    def close(self) -> None:
        """End all processes."""
        for worker in list(self._workers):
            self._end(worker)


class _Worker:
    """A process as its parent sees it. task: what it is at. has_worked: whether it ever answered.

    A pipe that only its two ends hold tells of the death of the other end, in the middle of a
    message too.
    """

    def __init__(self, process: BaseProcess, pipe: Connection) -> None:
        self._process, self.pipe = process, pipe
        self.task: Numbered | None = None
        self.has_worked = False

    @classmethod
    def started(cls, make: Start, threads: int) -> _Worker:
        """A new one."""
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(make, threads, theirs))
        process.start()
        theirs.close()
        return cls(process, ours)

    def give(self, task: Numbered) -> None:
        """Send it a task; one that has died meanwhile is found out when it is listened to."""
        self.task = task
        with contextlib.suppress(OSError):
            self.pipe.send(task[1])

    def take(self) -> Numbered:
        """What it was at, which it is no more."""
        task, self.task = self.task, None
        if task is None:
            raise AssertionError("an idle worker was listened to")
        return task

    def end(self) -> None:
        """End it, and wait until it has."""
        self._process.terminate()
        self._process.join(PATIENCE)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
        self.pipe.close()


# -- in a worker ---------------------------------------------------------------------------------


def _serve(make: Start, threads: int, pipe: Connection) -> None:
    """Do each task that comes, until there is nobody any more who would send one."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the first process sees to it
    signal.signal(signal.SIGTERM, _stop)
    _end_with_parent()
    torch.set_num_threads(threads)
    works: list[Work] = []

    def work(task: Any) -> Any:
        if not works:  # within the first task, whose outcome says if it fails
            works.append(make(pipe.send))
        return works[0](task)

    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError, KeyboardInterrupt):
        while True:
            outcome = Outcome.of(work, pipe.recv())
            try:
                pipe.send(outcome)
            except OSError:
                raise
            except Exception:  # noqa: BLE001 -- it cannot be pickled, and nothing was sent
                pipe.send(Outcome(fault=traceback.format_exc()))


def _stop(*_: object) -> None:
    """Unwind, so that temporary folders are removed."""
    raise KeyboardInterrupt


def _end_with_parent() -> None:
    """End this process when its parent has ended, even by SIGKILL, since nobody takes results."""
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
