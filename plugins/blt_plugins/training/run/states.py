"""The saved states of an unfinished run: ``OUT/state/PHASE-STEP/``, no pickle.

A state is written under a temporary name and renamed when all of it is on the disk. Its
description, ``state.json``, tells size and checksum of every other file, and its own checksum, so
that a damaged state is known, and the one before it is taken.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
from collections.abc import Callable
from pathlib import Path

import attrs

from blt_core.errors import CheckpointError, DataError, RunError
from blt_core.files import is_stray
from blt_core.storage.folders import current_folder, file_errors
from blt_plugins.training.run.state_files import (
    DESCRIPTION,
    Tell,
    TrainingState,
    describe,
    read,
    sum_share,
    write_rest,
)
from blt_plugins.training.run.together import Agree, agreed

_NAME = re.compile(r"[a-z]+-\d{8}")
_TEMPORARY = re.compile(r"\.[a-z]+-\d{8}\.(new|old)-[0-9a-f]+")
#: A state on its way out, while one of the same step takes its name.
_FORMER = re.compile(r"\.([a-z]+-\d{8})\.former")


@attrs.frozen
class Found:
    """A state that can be gone on from, and the folder of the files of its backend."""

    state: TrainingState
    folder: Path


class States:
    """The states of one run, of which the last ``keep`` are kept.

    phases: their names in the order of the run. Raises DataError, when it is made, if the folder
    holds anything else than states.
    """

    def __init__(self, folder: Path, phases: tuple[str, ...], keep: int) -> None:
        self._folder, self._phases, self._keep = folder, phases, keep
        self._check()

    def save(
        self,
        state: TrainingState,
        write: Callable[[Path], None],
        *,
        rank: int = 0,
        processes: int = 1,
        agree: Agree = lambda _failed: None,
    ) -> Path:
        """Write a state; ``write`` adds the backend's files to its folder, in every process.

        Process 0 writes the rest and renames; until it has, the former states are all there is.
        Checksums are dealt out to all. agree: see :func:`agreed`.

        Returns the state's folder. Raises RunError if a file cannot be written.
        """
        fresh, main = self.fresh(state), rank == 0

        def finish() -> None:
            with file_errors(fresh, RunError):
                write_rest(fresh, state)
            self.complete(state, processes)

        agreed(lambda: self.begin(state) if main else None, agree)
        with file_errors(fresh, RunError):
            write(fresh)
        agree(False)
        agreed(lambda: sum_share(fresh, rank, processes), agree)
        agreed(lambda: finish() if main else None, agree)
        return self.target(state)

    def fresh(self, state: TrainingState) -> Path:
        """The folder in which a state is written."""
        return self._folder / f".{state.folder_name}.new-0"

    def begin(self, state: TrainingState) -> None:
        """Make that folder."""
        self.tidy()
        with file_errors(self.fresh(state), RunError):
            self.fresh(state).mkdir(parents=True)

    def complete(self, state: TrainingState, processes: int) -> Path:
        """Have a state count whose files are all written and summed; returns its folder."""
        fresh, target = self.fresh(state), self.target(state)
        with file_errors(fresh, RunError):
            describe(fresh, state, processes)
        self._replace(target, fresh)
        return target

    def give_up(self, state: TrainingState) -> None:
        """Remove what is written of a state that was begun."""
        shutil.rmtree(self.fresh(state), ignore_errors=True)

    def target(self, state: TrainingState) -> Path:
        """The folder of a state that counts."""
        return self._folder / state.folder_name

    def _replace(self, target: Path, fresh: Path) -> None:
        """Have the new state take its name, and remove those that are not kept."""
        former = self._folder / f".{target.name}.former"
        with file_errors(target, RunError):
            if target.exists():  # of the same step: it is put back where a kill comes in between
                target.rename(former)
            fresh.rename(target)
        shutil.rmtree(former, ignore_errors=True)
        # Newer ones were damaged and passed over: what they stood for is done anew.
        folders = self._folders()
        place = folders.index(target)
        for old in (*folders[:place], *folders[place + self._keep :]):
            discard(old)

    def latest(
        self,
        warn: Callable[[str], None],
        *,
        rank: int = 0,
        processes: int = 1,
        tell: Tell = lambda text: [text],
    ) -> Found | None:
        """The newest state that is whole, the same in all processes; None if there is none at all.

        They share out the check of its files. What counts are the states that process 0 sees.
        ``warn`` is told of each damaged one that is passed over. Raises CheckpointError if all of
        them are damaged, or if they are of another version.
        """
        problems = []
        if rank == 0:
            self._put_back()
        names = "/".join(folder.name for folder in self._folders()) if rank == 0 else ""
        for name in filter(None, tell(names)[0].split("/")):
            folder = self._folder / name
            try:
                return Found(read(folder, rank, processes, tell), folder)
            except ValueError as error:
                problems.append(f"{folder}: this state is damaged ({error})")
                warn(f"warning: {problems[-1]}; looking for the one before it")
        if problems:
            raise CheckpointError("\n".join([*problems, "  fix: start anew with --fresh"]))
        return None

    def clear(self) -> None:
        """Remove all states, the newest last."""
        for folder in reversed(self._folders()):
            discard(folder)

    def tidy(self) -> None:
        """Remove what is left of writes and removals that were cut off."""
        self._put_back()
        for path in self._folder.iterdir() if self._folder.is_dir() else ():
            if _TEMPORARY.fullmatch(path.name) or _FORMER.fullmatch(path.name):
                shutil.rmtree(path, ignore_errors=True)

    def _put_back(self) -> None:
        """Give a state its name back that was to be replaced when the process was killed."""
        for path in list(self._folder.iterdir()) if self._folder.is_dir() else ():
            found = _FORMER.fullmatch(path.name)
            if found and not (target := self._folder / found[1]).exists():
                with file_errors(target, RunError):
                    path.rename(target)

    def _folders(self) -> list[Path]:
        """Newest first."""
        paths = self._folder.iterdir() if self._folder.is_dir() else ()
        return sorted(filter(_is_state, paths), key=self._age, reverse=True)

    def _age(self, path: Path) -> tuple[int, int]:
        phase, _, step = path.name.partition("-")
        return (self._phases.index(phase) if phase in self._phases else -1, int(step))

    def _check(self) -> None:
        with file_errors(self._folder, DataError):
            paths = list(self._folder.iterdir()) if self._folder.exists() else []
            if any(path.name == DESCRIPTION for path in paths):
                raise DataError(
                    f"{self._folder}: written by another version of blt\n"
                    "  fix: move it away, or choose another --out"
                )
            for path in paths:
                if is_stray(path.name):
                    continue
                known = _is_state(path) or any(
                    pattern.fullmatch(path.name) for pattern in (_TEMPORARY, _FORMER)
                )
                if path.is_file() or not known:  # another process may remove it meanwhile
                    raise DataError(
                        f"{self._folder}: holds {path.name!r}, which is no state of a run\n"
                        "  fix: move it away, or choose another --out"
                    )


def _is_state(path: Path) -> bool:
    return _NAME.fullmatch(path.name) is not None


def discard(folder: Path) -> None:
    """Remove a state or a model; it loses its name first, so that no half of it is found."""
    with file_errors(folder, RunError):
        folder = Path(os.path.realpath(folder))
        gone = folder.rename(folder.with_name(f".{folder.name}.old-{secrets.token_hex(4)}"))
    shutil.rmtree(gone, ignore_errors=True)


def tidy_model(folder: Path) -> None:
    """Remove what is left of replacements of a model that were cut off.

    Where that was between two names, the former model is put back.
    """
    target = Path(os.path.realpath(folder))
    # The names of blt_core.storage: a new folder, the former one, the former one on its way out.
    name, number = re.escape(target.name), "[0-9a-f]+"
    temporary = re.compile(rf"\.{name}\.(old|(new|old)-{number})|\.\.{name}\.old\.new-{number}")
    with file_errors(folder, RunError):
        if (former := current_folder(target)) != target:
            former.rename(target)
        for path in target.parent.iterdir():
            if temporary.fullmatch(path.name):
                shutil.rmtree(path, ignore_errors=True)
