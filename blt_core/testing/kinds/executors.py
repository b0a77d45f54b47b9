"""What executors promise."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path

import attrs
import torch
from hypothesis import strategies as st

from blt_core.errors import DataError
from blt_core.execution import Start, Tell, Work
from blt_core.testing.contracts import Broken, Contracts, NotPromised, require
from blt_core.testing.subject import Subject

EXECUTOR = Contracts("executor")

#: Tasks that no executor takes before one of them is done.
MANY = 10_000
#: Tasks, some of which one worker gets.
SEVERAL = 40


def _squared(tell: Tell) -> Work:
    def work(number: int) -> int:
        tell(number)
        return number * number

    return work


def _named(_tell: Tell) -> Work:
    name = uuid.uuid4().hex
    return lambda _task: (name, os.getpid(), torch.get_num_threads())


def _refusing(_tell: Tell) -> Work:
    def work(number: int) -> int:
        raise DataError(f"task {number}: unfit\n  fix: another one")

    return work


def _unmakeable(_tell: Tell) -> Work:
    raise DataError("no such model")


@attrs.frozen
class _Dying:
    """Work that ends its process, if none before it has, and it is not the ``caller``.

    left: the path of a file by which it knows.
    """

    left: str
    caller: int

    def __call__(self, _tell: Tell) -> Work:
        """The work."""
        return self.work

    def work(self, number: int) -> int:
        """Do a task, or die of it."""
        if number == 1 and os.getpid() != self.caller and not Path(self.left).exists():
            Path(self.left).touch()
            os._exit(1)
        return number * number


@EXECUTOR.add(
    "dies",
    "A task whose worker process dies is done again by another one, and so are those that died "
    "with it.",
)
def _dies(subject: Subject, _: None) -> None:
    with tempfile.TemporaryDirectory(prefix="blt-") as folder:
        left = Path(folder) / "left"
        with subject.build().start(_Dying(str(left), os.getpid())) as workers:
            found = sorted(workers.run(range(4)))
        if not left.exists():
            raise NotPromised("its work is done in the process that asks for it")
        require(found == [(n, n * n) for n in range(4)], f"gave {found} after a worker had died")


@EXECUTOR.add(
    "results",
    "`run` gives the result of each task once, with its number, in any order.",
    lambda _: st.lists(st.integers(0, 99), max_size=9),
    share=0.2,
)
def _results(subject: Subject, tasks: list[int]) -> None:
    with subject.build().start(_squared) as workers:
        found = sorted(workers.run(tasks))
    wanted = [(number, task * task) for number, task in enumerate(tasks)]
    require(found == wanted, f"gave {found} for tasks whose squares are {wanted}")


@EXECUTOR.add("again", "The same workers can be given tasks several times.")
def _again(subject: Subject, _: None) -> None:
    with subject.build().start(_squared) as workers:
        for count in (3, 2):
            found = sorted(workers.run(range(count)))
            require(found == [(n, n * n) for n in range(count)], f"gave {found} of {count} tasks")


@EXECUTOR.add("lazy", "Tasks are taken as workers become free: there may be any number of them.")
def _lazy(subject: Subject, _: None) -> None:
    def tasks() -> Iterator[int]:
        yield from range(MANY)
        raise Broken(f"it takes {MANY} tasks before one of them is done")

    with subject.build().start(_squared) as workers:
        found = list(itertools.islice(workers.run(tasks()), 5))
    require(len(found) == 5, f"gave {len(found)} results of many")  # noqa: PLR2004


@EXECUTOR.add("once", "A worker makes its work once, however many tasks it gets.")
def _once(subject: Subject, _: None) -> None:
    with subject.build().start(_named) as workers:
        names = {name for _number, (name, *_rest) in workers.run(range(SEVERAL))}
    require(len(names) < SEVERAL, f"made the work {len(names)} times for {SEVERAL} tasks")


@EXECUTOR.add("told", "What tasks tell is handed on, all of it by the end, in the caller's thread.")
def _told(subject: Subject, _: None) -> None:
    amounts: list[int] = []
    with subject.build().start(_squared) as workers:
        list(workers.run(range(6), amounts.append))
        list(workers.run(range(3)))
    require(sum(amounts) == sum(range(6)), f"handed on {amounts}, of 15 that were told")


@EXECUTOR.add(
    "errors",
    "An error of blt_core.errors that a task or the making of the work raises comes out as it is.",
)
def _errors(subject: Subject, _: None) -> None:
    _require_error(subject, _refusing, "task 0: unfit\n  fix: another one")
    _require_error(subject, _unmakeable, "no such model")


def _require_error(subject: Subject, make: Start, text: str) -> None:
    try:
        with subject.build().start(make) as workers:
            found = list(workers.run([0]))
    except DataError as error:
        require(str(error) == text, f"raised {error!r}; the task raised {text!r}")
    except Exception as error:
        raise Broken(f"raised {error!r} where the task raised a DataError") from error
    else:
        raise Broken(f"gave {found} of a task that raised a DataError")


@EXECUTOR.add(
    "threads",
    "Work is done on `threads` threads of torch; afterwards the caller has its own number.",
)
def _threads(subject: Subject, _: None) -> None:
    before = torch.get_num_threads()
    executor = subject.build()
    try:
        torch.set_num_threads(executor.threads + 1)
        with executor.start(_named) as workers:
            [(_number, (_name, _process, found))] = workers.run([0])
        require(found == executor.threads, f"worked on {found} threads of {executor.threads}")
        after = torch.get_num_threads()
        require(after == executor.threads + 1, f"left {after} threads of {executor.threads + 1}")
    finally:
        torch.set_num_threads(before)


@EXECUTOR.add("ends", "No process that it has started lives when the block is left.")
def _ends(subject: Subject, _: None) -> None:
    before = set(multiprocessing.active_children())
    with subject.build().start(_squared) as workers:
        list(workers.run(range(3)))
    left = set(multiprocessing.active_children()) - before
    for process in left:
        process.kill()
    require(not left, f"left {len(left)} processes")
