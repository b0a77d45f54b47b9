"""The component ``ray``: workers are processes of a Ray cluster (the extra ``ray``)."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import attrs
import torch

from blt_core.component import BuildContext, Component, at_least
from blt_core.errors import DataError, RunError
from blt_core.execution import Outcome, Start, Tell, Work, Workers
from blt_core.log import logger

#: Seconds after which a wait for results begins anew, so that signals are heard.
GLANCE = 1.0
#: Seconds that a cluster has to answer.
PATIENCE = 10.0
_START = "start one (ray start --head), or leave the address out"
#: What to do where something answers, but does not let this process in.
_JOIN = (
    "something answers there; if its cluster has a token, as one has that was started where there "
    "is a ~/.ray/auth_token, copy that file here (or set RAY_AUTH_TOKEN) and set "
    "RAY_AUTH_MODE=token; versions of Ray and Python must be the same too"
)
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
        _take_token()
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
            _connect(ray, params)
        workers = _RayWorkers(ray, params, make)
        try:
            yield workers
        finally:
            workers.is_open = False
            if own:
                ray.shutdown()


def _take_token() -> None:
    """Have Ray show a token that is there to the cluster of any address, as to one that it finds.

    Ray reads the variable when it is imported. A cluster without a token does not look at it.
    """
    named = any(os.environ.get(name) for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"))
    if named or (Path.home() / ".ray" / "auth_token").is_file():
        os.environ.setdefault("RAY_AUTH_MODE", "token")


def _connect(ray: Any, params: RayParams) -> None:
    """Find the cluster, or start one. Raises RunError where none answers, or takes us."""
    address = params.address or ""
    if address in ("", "auto"):
        address = os.environ.get("RAY_ADDRESS", address)
    # Of a cluster that is started here: tasks whose memory ran out are not done again for ever, and
    # workers get their part of a busy CPU, as those of `local` do (Ray's 15 leaves them 3 % of it).
    os.environ.setdefault("RAY_task_oom_retries", str(params.retries))
    os.environ.setdefault("RAY_worker_niceness", "0")
    main = threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGTERM)
    where, fix = address or "this machine", _START
    try:
        if _reach(address):
            fix = _JOIN
        ray.init(
            address=params.address,
            log_to_driver=False,  # it would go to stdout
            logging_level="ERROR",
        )
    except ray.exceptions.AuthenticationError as error:
        text = f"executor.address: the Ray cluster at {where} wants a token: {error}"
        raise RunError(f"{text}\n  fix: {_JOIN}") from error
    except (OSError, ValueError, RuntimeError) as error:
        raise RunError(
            f"executor.address: no Ray cluster answers at {where}: {error}\n  fix: {fix}"
        ) from error
    finally:
        if main:  # Ray takes the signal over
            signal.signal(signal.SIGTERM, before)


def _reach(address: str) -> bool:
    """Raise OSError where HOST:PORT does not answer: Ray waits minutes for it, and then exits.

    Whether it is known that something answers.
    """
    host, colon, port = address.rpartition(":")
    is_known = bool(colon) and port.isdecimal() and "//" not in host
    if is_known:
        socket.create_connection((host, int(port)), timeout=PATIENCE).close()
    return is_known


class _RayWorkers:
    """Fulfils :class:`blt_core.execution.Workers`. is_open: until the block is left."""

    def __init__(self, ray: Any, params: RayParams, make: Start) -> None:
        self._ray, self._params, self.is_open = ray, params, True
        self._make = ray.put(make)
        self._making = _Making(uuid.uuid4().hex, params.threads, os.getcwd())  # noqa: PTH109
        self._do = ray.remote(
            num_cpus=params.threads,
            num_gpus=params.gpus,
            memory=params.memory_bytes,
            max_retries=params.retries,
            max_calls=0,  # with GPUs Ray would begin a new process for each task
        )(_do)
        self._look_for_room()

    def _look_for_room(self) -> None:
        """Warn where no node can do a task now: Ray waits for one, which may be on its way."""
        needs = {"CPU": self._params.threads, "GPU": self._params.gpus}
        needs["memory"] = self._params.memory_bytes or 0
        nodes = [node["Resources"] for node in self._ray.nodes() if node["Alive"]]
        if not any(all(node.get(k, 0) >= v for k, v in needs.items()) for node in nodes):
            logger().warning(
                "no node of the Ray cluster has room for a task; waiting for one that has",
                **{name: amount for name, amount in needs.items() if amount},
                fix="lower threads, gpus or memory_bytes of [executor], or add a node",
            )

    def run(self, tasks: Iterable[Any], watch: Tell | None = None) -> Iterator[tuple[int, Any]]:
        """As the protocol has it. Raises RunError where workers are lost too often."""
        left = enumerate(tasks)
        under_way: dict[Any, int] = {}
        try:
            while True:
                self._fill(under_way, left)
                if not under_way:
                    return
                done, _ = self._ray.wait(list(under_way), timeout=GLANCE)
                for each in done:
                    number, outcome = under_way.pop(each), self._outcome(each)
                    if watch is not None and outcome.told:
                        watch(outcome.told)
                    yield number, outcome.take()
        finally:
            for each in under_way if self.is_open else ():
                self._ray.cancel(each)

    def _fill(self, under_way: dict[Any, int], left: Iterator[tuple[int, Any]]) -> None:
        most = self._params.workers or AHEAD * self._room()
        while len(under_way) < most and (one := next(left, None)) is not None:
            number, task = one
            under_way[self._do.remote(self._making, self._make, task)] = number

    def _room(self) -> int:
        """Tasks that the cluster can run at a time, about; it may grow and shrink."""
        found = self._ray.cluster_resources()
        rooms = [found.get("CPU", 0) / self._params.threads]
        if self._params.gpus:
            rooms.append(found.get("GPU", 0) / self._params.gpus)
        return max(int(min(rooms)), 1)

    def _outcome(self, done: Any) -> Outcome:
        errors = self._ray.exceptions
        try:
            outcome: Outcome = self._ray.get(done)
        except errors.RayTaskError as error:  # not even the task could be read there
            raise RunError(
                f"a worker of the Ray cluster cannot work: {error.cause!r}\n"
                "  fix: install the same packages and plugins on every node"
            ) from error
        except errors.RayError as error:
            raise RunError(
                "a worker of the Ray cluster has ended before its time, at a task that was begun "
                f"{self._params.retries + 1} × in all: {str(error).splitlines()[0]}; "
                "what was finished is kept, and the same command goes on\n"
                "  fix: if memory ran out, use fewer workers, or memory_bytes"
            ) from error
        return outcome


# -- in a worker ---------------------------------------------------------------------------------


@attrs.frozen
class _Making:
    """How the work is made: a name of this run, threads, and the caller's folder."""

    name: str
    threads: int
    folder: str


#: The work of this process, and the name of its run; that of the run before is let go.
_made: dict[str, Work] = {}
#: What the task that is done has told.
_told: list[int] = []


def _do(making: _Making, make: Start, task: Any) -> Outcome:
    def work(each: Any) -> Any:
        return _work_of(making, make)(each)  # making it may fail as well

    _told.clear()
    outcome = Outcome.of(work, task)
    return attrs.evolve(outcome, told=sum(_told))


def _work_of(making: _Making, make: Start) -> Work:
    if making.name not in _made:
        _made.clear()
        torch.set_num_threads(making.threads)
        with contextlib.suppress(OSError):  # of another machine: its paths may be absolute
            os.chdir(making.folder)
        _made[making.name] = make(_told.append)
    return _made[making.name]


RAY = Component(
    kind="executor",
    name="ray",
    factory=RayExecutor,
    params=RayParams,
    summary="processes of a Ray cluster (extra: ray)",
)
