"""The component ``ray``: workers are processes of a Ray cluster (the extra ``ray``)."""

from __future__ import annotations

import contextlib
import os
import socket
import uuid
from collections.abc import Iterable, Iterator
from typing import Any

import attrs
import torch

from blt_core.component import BuildContext, Component, at_least
from blt_core.errors import DataError, RunError
from blt_core.execution import Outcome, Start, Tell, Work, Workers

#: Seconds between two looks at how far the workers are.
GLANCE = 0.2
#: Seconds that the last look, and finding a cluster, may take.
PATIENCE = 10.0
#: Tasks that Ray is given for each that it can run, so that no worker is idle.
AHEAD = 2


@attrs.frozen(kw_only=True)
class RayParams:
    """A Ray cluster; without an address that of RAY_ADDRESS, or one that is started here.

    address: of a cluster, as ``auto`` or ``ray://head:10001``. workers: tasks at a time; None: as
    many as the cluster has room for. threads: of torch, and CPUs that Ray sets aside for a task.
    gpus: as many, maybe a part of one; with any, set ``device = "cuda"``. memory_bytes: likewise.
    retries: how often a task is done again whose worker or node has died.
    """

    address: str | None = None
    workers: int | None = attrs.field(default=None, validator=at_least(1))
    threads: int = attrs.field(default=1, validator=at_least(1))
    gpus: float = attrs.field(default=0.0, validator=at_least(0))
    memory_bytes: int | None = attrs.field(default=None, validator=at_least(1))
    retries: int = attrs.field(default=3, validator=at_least(0))


class RayExecutor:
    """Fulfils :class:`blt_core.execution.Executor`. Raises DataError, when made, without Ray.

    Tasks are Ray's own, so that it places them, and does them again elsewhere when a worker or a
    node is lost; a process makes the work once, and keeps it for the tasks that it gets after that.
    """

    def __init__(self, params: RayParams, context: BuildContext) -> None:
        try:
            import ray
        except ImportError as error:
            raise DataError(
                f"the executor 'ray' needs a package that is not installed ({error})\n"
                "  fix: pip install 'blt-core[ray]'"
            ) from error
        self._ray, self._params = ray, params
        self.threads = params.threads

    @contextlib.contextmanager
    def start(self, make: Start) -> Iterator[Workers]:
        """A connection to the cluster, which ends with the block, unless it was there before."""
        ray, params = self._ray, self._params
        own = not ray.is_initialized()
        if own:
            address = params.address or os.environ.get("RAY_ADDRESS", "this machine")
            try:
                _reach(address)
                ray.init(
                    address=params.address,
                    log_to_driver=False,  # it would go to stdout
                    logging_level="ERROR",
                )
            except (OSError, ValueError, RuntimeError) as error:
                raise RunError(
                    f"executor.address: no Ray cluster answers at {address}: {error}\n"
                    "  fix: start one (ray start --head), or leave the address out"
                ) from error
        try:
            yield _RayWorkers(ray, params, make)
        finally:
            if own:
                ray.shutdown()


def _reach(address: str) -> None:
    """Raise OSError where HOST:PORT does not answer: Ray waits minutes for it, and then exits."""
    host, colon, port = address.rpartition(":")
    if colon and port.isdecimal() and "//" not in host:
        socket.create_connection((host, int(port)), timeout=PATIENCE).close()


class _RayWorkers:
    """Fulfils :class:`blt_core.execution.Workers`."""

    def __init__(self, ray: Any, params: RayParams, make: Start) -> None:
        self._ray, self._params = ray, params
        strategy = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy
        here = strategy(ray.get_runtime_context().get_node_id(), soft=True)
        counter = ray.remote(num_cpus=0, max_restarts=-1, scheduling_strategy=here)(_Counter)
        self._counter = counter.remote()
        self._seen = 0
        start = _Making(ray.put(make), uuid.uuid4().hex, params.threads, os.getcwd())  # noqa: PTH109
        self._start = ray.put(start)
        self._do = ray.remote(
            num_cpus=params.threads,
            num_gpus=params.gpus,
            memory=params.memory_bytes,
            max_retries=params.retries,
        )(_do)

    def run(self, tasks: Iterable[Any], watch: Tell | None = None) -> Iterator[tuple[int, Any]]:
        """As the protocol has it. Raises RunError where workers are lost too often."""
        left, under_way = enumerate(tasks), {}
        try:
            while True:
                self._fill(under_way, left)
                if not under_way:
                    self._tell(watch, PATIENCE)
                    return
                done, _ = self._ray.wait(list(under_way), timeout=GLANCE)
                self._tell(watch)
                for each in done:
                    number = under_way.pop(each)
                    yield number, self._result(each).take()
        finally:
            for each in under_way:
                self._ray.cancel(each, force=False)

    def _fill(self, under_way: dict[Any, int], left: Iterator[tuple[int, Any]]) -> None:
        most = AHEAD * self._room()
        while len(under_way) < most:
            number, task = next(left, (None, None))
            if number is None:
                return
            under_way[self._do.remote(self._start, self._counter, task)] = number

    def _room(self) -> int:
        """Tasks that the cluster can run at a time; it may grow and shrink."""
        if self._params.workers is not None:
            return self._params.workers
        found = self._ray.cluster_resources()
        rooms = [found.get("CPU", 0) / self._params.threads]
        if self._params.gpus:
            rooms.append(found.get("GPU", 0) / self._params.gpus)
        return max(int(min(rooms)), 1)

    def _result(self, done: Any) -> Outcome:
        errors = self._ray.exceptions
        try:
            outcome: Outcome = self._ray.get(done)
        except errors.RayTaskError as error:
            raise error.cause from error
        except errors.RayError as error:
            raise RunError(
                f"a worker of the Ray cluster has ended before its time, "
                f"{self._params.retries + 1} times: {str(error).splitlines()[0]}; "
                "what was finished is kept, and the same command goes on\n"
                "  fix: if memory ran out, use fewer workers, or memory_bytes"
            ) from error
        return outcome

    def _tell(self, watch: Tell | None, patience: float = GLANCE) -> None:
        if watch is None:
            return
        with contextlib.suppress(self._ray.exceptions.RayError):  # its node is lost: it starts anew
            now = self._ray.get(self._counter.total.remote(), timeout=patience)
            if now > self._seen:
                watch(now - self._seen)
            self._seen = now


class _Counter:
    """What all workers have told."""

    def __init__(self) -> None:
        self._total = 0

    def add(self, amount: int) -> None:
        self._total += amount

    def total(self) -> int:
        return self._total


# -- in a worker ---------------------------------------------------------------------------------


@attrs.frozen
class _Making:
    """What makes the work: a reference to it, a name of this run, threads, the caller's folder."""

    make: Any
    name: str
    threads: int
    folder: str


#: The work of this process, and the name of its run; that of the run before is let go.
_made: dict[str, Work] = {}
#: What was told by the task that is done.
_told: list[Any] = []


def _do(making: _Making, counter: Any, task: Any) -> Outcome:
    import ray

    def work(each: Any) -> Any:
        return _work_of(making, counter)(each)  # making it may fail as well

    outcome = Outcome.of(work, task)
    with contextlib.suppress(ray.exceptions.RayError):  # none but the progress bar would miss it
        ray.get(_told)
    _told.clear()
    return outcome


def _work_of(making: _Making, counter: Any) -> Work:
    import ray

    if making.name not in _made:
        _made.clear()
        torch.set_num_threads(making.threads)
        with contextlib.suppress(OSError):  # of another machine: its paths may be absolute
            os.chdir(making.folder)
        make: Start = ray.get(making.make)
        _made[making.name] = make(lambda amount: _told.append(counter.add.remote(amount)))
    return _made[making.name]


RAY = Component(
    kind="executor",
    name="ray",
    factory=RayExecutor,
    params=RayParams,
    summary="processes of a Ray cluster (extra: ray)",
)
