"""Work between steps that the processes of a run do together: a batch at a time, to one end."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, wait
from contextlib import contextmanager, suppress
from typing import TypeVar

from torch import distributed as dist

from blt_core.errors import RunError
from blt_core.protocols import TrainingBackend
from blt_plugins.training.corpora.unwanted import can_end
from blt_plugins.training.data.shares import Share
from blt_plugins.training.run.interrupts import Stopped

T = TypeVar("T")

#: Waits for the other processes, is told whether this one has failed, and raises an error where
#: another one has.
Agree = Callable[[bool], object]
#: Seconds after which a process that works alone tells the others that it is alive.
BEAT = 5.0
#: Seconds in which work that nobody waits for any more has to end, or is left behind.
LONGEST_END = 10.0


class OtherProcessError(RunError):
    """The work has failed in another process, whose own message says why."""


class Together:
    """Agrees with the other processes before each batch, so that none waits for one that has ended.

    Within :meth:`work` every process calls the same methods in the same order. Before each round,
    each sum and the end they tell each other whether any was asked to stop, or has failed; a
    process that fails tells it where the others ask next. One that dies without a word is found out
    by the backend's collectives: at once where its connection closes, or after their timeout.
    """

    def __init__(self, backend: TrainingBackend, asked: Callable[[], bool], what: str) -> None:
        """asked: whether this process was asked to stop. what: the work, in messages."""
        self._backend, self._asked, self._what = backend, asked, what
        self._lost = False

    @property
    def rank(self) -> int:
        """Which process this is."""
        return self._backend.rank

    @property
    def processes(self) -> int:
        """How many there are."""
        return self._backend.world_size

    @contextmanager
    def work(self) -> Iterator[None]:
        """Work that all processes end together.

        Raises Stopped in all of them once one was asked to stop, OtherProcessError where another
        one has failed, and RunError where one has ended or does not answer.
        """
        try:
            yield
            self.agree()
        except (Stopped, OtherProcessError):
            raise
        except Exception:
            if not self._lost:
                self._tell_failure()
            raise

    def each(self, share: Share[T]) -> Iterator[T]:
        """The batches of this process; in a round that it has none for, it only agrees."""
        for number in range(share.rounds):
            self.agree(may_stop=True)
            yield from share.batches[number : number + 1]

    def first_alone(self, do: Callable[[], T]) -> T:
        """What ``do`` gives, in each process; the others begin when process 0 has done it.

        For work whose result is kept on a disk, and which the others may have to do again where
        they share none. However long it takes, no collective waits longer than some seconds: each
        does it in a thread, and tells the others that it is alive.
        """
        if self._backend.world_size == 1:
            return do()
        self.agree()  # all have come so far
        if self._backend.rank != 0:
            self._wait_for_others()
        with _in_thread(do) as found:
            while not wait([found], timeout=BEAT).done:
                self.total([1.0])
            result = found.result()
            self._wait_for_others()
        if self._backend.rank == 0:
            self._wait_for_others()
        return result

    def _wait_for_others(self) -> None:
        """Until none of them works."""
        while self.total([0.0]) != [0.0]:
            pass

    def total(self, values: Sequence[float]) -> list[float]:
        """The sum of each value over the processes, in float64, the same in all of them."""
        self.agree()
        return [mean * self._backend.world_size for mean in self._mean(values)]

    def tell(self, text: str) -> list[str]:
        """Tell the others a text; gives the text of each process, in the order of their ranks."""
        count, own = self.processes, text.encode()

        def shared(values: Sequence[int]) -> list[int]:
            """The values of each process, one process after another."""
            rows = [values if rank == self.rank else [0] * len(values) for rank in range(count)]
            return [round(value) for value in self.total([v for row in rows for v in row])]

        sizes = shared([len(own)])
        if not (width := max(sizes)):
            return [""] * count
        codes = shared([*own, *[0] * (width - len(own))])
        return [
            bytes(codes[rank * width :][:size]).decode(errors="replace")
            for rank, size in enumerate(sizes)
        ]

    def agree(self, *, may_stop: bool = False, failed: bool = False) -> None:
        """Tell the others whether this process has failed, and hear of them.

        Raises OtherProcessError where another one has failed, Stopped if it ``may_stop`` and one
        was asked to, RunError where one has ended or does not answer.
        """
        backend = self._backend
        flags = [float(failed and rank == backend.rank) for rank in range(backend.world_size)]
        stopped, *others = self._mean([float(self._asked()), *flags])
        if failed:
            return
        if found := [str(rank) for rank, flag in enumerate(others) if flag > 0]:
            raise OtherProcessError(
                f"{self._what}: failed in process {', '.join(found)} of {backend.world_size} "
                "(counted from 0)\n  fix: see the message of that process"
            )
        if may_stop and stopped > 0:
            raise Stopped

    def _tell_failure(self) -> None:
        with suppress(Exception):  # the failure itself is what is to be raised
            self.agree(failed=True)

    def _mean(self, values: Sequence[float]) -> list[float]:
        try:
            return self._backend.mean(values)
        except RuntimeError as error:
            self._lost = True  # nobody may be left who would hear of it
            raise lost(self._what, error) from error


def lost(what: str, error: RuntimeError) -> RunError:
    """The error of a process that waits for others in vain, for what came of it."""
    return RunError(
        f"{what}: another process has ended, or does not answer: {error}\n"
        "  fix: see the messages of the other processes, then run the same command again"
    )


@contextmanager
def named_loss(what: str) -> Iterator[None]:
    """Tell an error of communication from one of this process: raises ``lost`` for the former."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, getattr(dist, "DistError", ())) or "gloo" in str(error):
            raise lost(what, error) from error
        raise


def agreed(work: Callable[[], T], agree: Agree) -> T:
    """Do ``work`` in this process, and hear whether it has failed in another."""
    try:
        found = work()
    except Exception:
        with suppress(Exception):  # the error itself is what is to be raised
            agree(True)
        raise
    agree(False)
    return found


@contextmanager
def _in_thread(do: Callable[[], T]) -> Iterator[Future[T]]:
    """What a thread finds; an error in the block ends its work."""
    found: Future[T] = Future()
    end = threading.Event()
    thread = threading.Thread(target=_fulfil, args=(found, do, end), daemon=True)
    thread.start()
    try:
        yield found
    except BaseException:
        end.set()
        thread.join(LONGEST_END)
        raise


def _fulfil(found: Future[T], do: Callable[[], T], end: threading.Event) -> None:
    can_end(end)
    try:
        found.set_result(do())
    except BaseException as error:  # noqa: BLE001 -- raised where the result is asked for
        found.set_exception(error)
