"""States that are written while training goes on: one at a time, by a thread of each process.

The thread copies nothing and talks to no other process: what it writes was put aside before, and
processes tell one another how far they are where the steps of a run agree anyway. So collectives
are made in one order, that of the main threads.

A save goes through two stages. Each process writes, flushes and sums its part. Once all have said
that they have, process 0 writes the description and renames, again in its thread. Until then the
former states are all there is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import attrs

from blt_core.errors import RunError
from blt_core.storage.folders import file_errors
from blt_plugins.training.backends.saving import Staging
from blt_plugins.training.run.state_files import TrainingState, sum_written, write_rest
from blt_plugins.training.run.states import States
from blt_plugins.training.run.together import Agree, agreed

#: Writes what a process has put aside into a folder; returns the files.
Write = Callable[[Path], Sequence[Path]]


@attrs.define(eq=False)
class Save:
    """A save in flight.

    work: what the thread does in the present stage. completes: whether that is the last one, as in
    all processes. agree: see :func:`agreed`.
    """

    state: TrainingState
    agree: Agree
    work: Future[object]
    completes: bool = False


class BackgroundStates:
    """Saves the states of a run in the background; all methods are called in the main thread.

    Every process makes the same calls in the same order. saved: told the folder of each state that
    counts from now on.
    """

    def __init__(
        self, states: States, rank: int, processes: int, saved: Callable[[Path], None]
    ) -> None:
        self._states, self._rank, self._processes = states, rank, processes
        self._saved = saved
        self._staging = Staging()
        self._thread: ThreadPoolExecutor | None = None
        self._save: Save | None = None

    def save(self, state: TrainingState, stage: Callable[[], Write], agree: Agree) -> None:
        """Begin to save a state, once the one before is done.

        stage: copies what the backend keeps, and gives what writes it. Raises RunError where the
        save before has failed.
        """
        self.finish()
        main = self._rank == 0
        agreed(lambda: self._states.begin(state) if main else None, agree)

        def put_aside() -> tuple[TrainingState, Write]:
            rest = self._staging.copy(state.rest) if main else {}
            return attrs.evolve(state, rest=rest), stage()

        try:
            state, write = agreed(put_aside, agree)
        except BaseException:
            self._remove(state)
            raise
        self._save = Save(state, agree, self._start(lambda: self._write(state, write)))

    def news(self) -> list[float]:
        """Whether it is still at the save in flight, and whether that has failed.

        As many numbers where there is none: sums of other lengths may be added in another order.
        """
        if self._save is None:
            return [0.0, 0.0]
        done = self._save.work.done()
        return [float(not done), float(done and self._save.work.exception() is not None)]

    def heard(self, means: Sequence[float]) -> None:
        """Go on with the save; means: of the :meth:`news` of all processes.

        Raises the error of a save that has failed: its own in the process where it was, in the
        others an OtherProcessError.
        """
        busy, failed = means
        if failed > 0:
            self.finish()
        elif self._save is not None and not busy:
            self._advance()

    def finish(self) -> None:
        """Wait until the save in flight is done, in all processes; raises as :meth:`heard` does."""
        while (save := self._save) is not None:
            try:
                agreed(save.work.result, save.agree)
            except Exception:
                self._give_up(save)
                raise
            self._advance()

    def close(self) -> None:
        """End the thread. A save in flight is completed where no other process is needed for it.

        Otherwise it is given up. Asks no other process, which may be gone.
        """
        if self._thread is not None:
            self._thread.shutdown()
            self._thread = None
        save = self._save
        if save is None:
            return
        self._save = None
        completed = save.completes and save.work.exception() is None
        if not save.completes and self._processes == 1 and save.work.exception() is None:
            with suppress(Exception):  # the run ends by an error of its own
                self._saved(self._states.complete(save.state, 1))
                completed = True
        if not completed:
            self._remove(save.state)

    def _write(self, state: TrainingState, write: Write) -> None:
        fresh = self._states.fresh(state)
        with file_errors(fresh, RunError):
            paths = list(write(fresh))
            if self._rank == 0:
                paths.append(write_rest(fresh, state))
            sum_written(fresh, self._rank, paths)

    def _advance(self) -> None:
        """Begin the next stage of the save in flight: all processes are done with the present."""
        save = self._save
        if save is None:
            return
        if save.completes:
            self._save = None
            self._saved(self._states.target(save.state))
            return

        def complete() -> None:
            if self._rank == 0:
                self._states.complete(save.state, self._processes)

        self._save = attrs.evolve(save, work=self._start(complete), completes=True)

    def _give_up(self, save: Save) -> None:
        self._save = None
        self._remove(save.state)

    def _remove(self, state: TrainingState) -> None:
        """Remove what is written of a state that will never count."""
        if self._rank == 0:
            self._states.give_up(state)

    def _start(self, work: Callable[[], object]) -> Future[object]:
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="blt-states")
        return self._thread.submit(work)
