"""The saved states of an unfinished run: ``OUT/state/PHASE-STEP/``, no pickle.

A state is written under a temporary name and renamed when all of it is on the disk. Its
description, ``state.json``, tells size and checksum of every other file, and its own checksum, so
that a damaged state is known, and the one before it is taken.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import zlib
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import attrs
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from blt_core.errors import CheckpointError, DataError, RunError
from blt_core.files import is_stray, read_json
from blt_core.storage.folders import current_folder, file_errors, flush_all
from blt_core.storage.tensors import unshared

VERSION = 2
DESCRIPTION, TENSORS = "state.json", "rest.safetensors"
#: What each process notes of the files that it checks, until all are in the description.
_SUMS = "sums-{}.json"

_NAME = re.compile(r"[a-z]+-\d{8}")
_TEMPORARY = re.compile(r"\.[a-z]+-\d{8}\.(new|old)-[0-9a-f]+")
#: Bytes that a checksum reads at once.
_CHUNK = 1 << 24
#: What a description consists of, beside its version and its checksum.
_NUMBER = (int, float, type(None))
_KINDS: Mapping[str, type | tuple[type, ...]] = {
    "phase": str, "step": int, "threshold": _NUMBER, "best": _NUMBER, "settings": dict,
    "files": dict,
}  # fmt: skip


@attrs.frozen(kw_only=True)
class TrainingState:
    """All that a run needs to go on as if it had never stopped, beside what the backend saves.

    phase, step: the next step to take. threshold: of the patcher, once calibrated. best: the best
    held-out bits per byte so far. settings: the tables that the run was started with. rest: tensors
    of the parts that the phase does not train, by name. generator: torch's global random state.
    scored: False if the run was stopped before the scores of this step, which are yet to be taken.
    """

    phase: str
    step: int
    threshold: float | None
    best: float | None
    settings: Mapping[str, Any]
    rest: Mapping[str, Tensor]
    generator: Tensor = attrs.field(factory=torch.get_rng_state)
    scored: bool = True

    @property
    def name(self) -> str:
        """How the state is told in words."""
        return f"{self.phase} step {self.step}"

    @property
    def folder_name(self) -> str:
        """The name of its folder."""
        return f"{self.phase}-{self.step:08}"


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
        agree: Callable[[bool], object] = lambda _failed: None,
    ) -> Path:
        """Write a state; ``write`` adds the backend's files to its folder, in every process.

        Process 0 writes the rest and renames; until it has, the former states are all there is.
        Checksums are dealt out to all. agree: waits for the other processes, is told whether this
        one has failed, and raises an error where another one has.

        Returns the state's folder. Raises RunError if a file cannot be written.
        """
        target = self._folder / state.folder_name
        fresh = target.with_name(f".{target.name}.new-0")
        main = rank == 0

        def stage(work: Callable[[], None]) -> None:
            error: Exception | None = None
            try:
                work()
            except Exception as raised:  # noqa: BLE001 -- raised again, when the others know
                error = raised
            if error is None:
                agree(False)
                return
            with suppress(Exception):  # the error itself is what is to be raised
                agree(True)
            raise error

        def begin() -> None:
            self.tidy()
            with file_errors(fresh, RunError):
                fresh.mkdir(parents=True)

        def finish() -> None:
            _describe(fresh, state, processes)
            self._replace(target, fresh)

        stage(begin if main else _nothing)
        with file_errors(fresh, RunError):
            write(fresh)
        agree(False)
        stage(lambda: _sum_share(fresh, rank, processes))
        stage(finish if main else _nothing)
        return target

    def _replace(self, target: Path, fresh: Path) -> None:
        """Have the new state take its name, and remove those that are not kept."""
        with file_errors(target, RunError):
            if target.exists():
                discard(target)
            fresh.rename(target)
        # Newer ones were damaged and passed over: what they stood for is done anew.
        folders = self._folders()
        place = folders.index(target)
        for old in (*folders[:place], *folders[place + self._keep :]):
            discard(old)

    def latest(self, warn: Callable[[str], None]) -> Found | None:
        """The newest state that is whole; None if there is none at all.

        ``warn`` is told of each damaged one that is passed over. Raises CheckpointError if all of
        them are damaged, or if they are of another version.
        """
        problems = []
        for folder in self._folders():
            try:
                return Found(_read(folder), folder)
            except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:  # noqa: PERF203
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
        for path in self._folder.iterdir() if self._folder.is_dir() else ():
            if _TEMPORARY.fullmatch(path.name):
                shutil.rmtree(path, ignore_errors=True)

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
                known = _is_state(path) or _TEMPORARY.fullmatch(path.name)
                if path.is_file() or not known:  # another process may remove it meanwhile
                    raise DataError(
                        f"{self._folder}: holds {path.name!r}, which is no state of a run\n"
                        "  fix: move it away, or choose another --out"
                    )


def _is_state(path: Path) -> bool:
    return _NAME.fullmatch(path.name) is not None


def _describe(folder: Path, state: TrainingState, processes: int) -> None:
    """Write what is not the backend's; the description last, for it tells of all other files."""
    with file_errors(folder, RunError):
        tensors = {**state.rest, "generator": state.generator}
        kept = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
        save_file(unshared(kept), folder / TENSORS)
        files = _summed(folder, processes)
        description = {
            "version": VERSION,
            "phase": state.phase,
            "step": state.step,
            "threshold": state.threshold,
            "best": state.best,
            "settings": state.settings,
            "scored": state.scored,
            "files": files,
        }
        text = json.dumps({**description, "checksum": _own_checksum(description)}, indent=1)
        (folder / DESCRIPTION).write_text(text, encoding="utf-8")
        flush_all(folder)


def _nothing() -> None:
    """What other processes do while one works."""


def _files(folder: Path) -> list[Path]:
    """Those of a state, but for notes and strays, which may be gone before they are checked."""
    return [
        path
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not is_stray(path.name) and not path.match(_SUMS.format("*"))
    ]


def _sum_share(folder: Path, rank: int, processes: int) -> None:
    """Note sizes and checksums of this process's share of the files of a state."""
    with file_errors(folder, RunError):
        found = {
            str(path.relative_to(folder)): _size_and_checksum(path)
            for path in _files(folder)[rank::processes]
        }
        (folder / _SUMS.format(rank)).write_text(json.dumps(found), encoding="utf-8")


def _summed(folder: Path, processes: int) -> dict[str, list[int]]:
    """Sizes and checksums of all files, by name: as noted, or else taken; the notes are removed.

    On a shared file system processes may see other listings for a while.
    """
    noted: dict[str, list[int]] = {}
    for path in (folder / _SUMS.format(rank) for rank in range(processes)):
        noted |= read_json(path)
        path.unlink()
    names = {str(path.relative_to(folder)): path for path in _files(folder)}
    if missing := noted.keys() - names.keys():
        raise RunError(f"{folder}: {', '.join(sorted(missing))} is not seen in process 0")
    return {name: noted.get(name) or _size_and_checksum(path) for name, path in names.items()}


def _size_and_checksum(path: Path) -> list[int]:
    return [path.stat().st_size, _checksum(path)]


def _read(folder: Path) -> TrainingState:
    description = read_json(folder / DESCRIPTION)
    if description["version"] != VERSION:
        raise CheckpointError(
            f"{folder}: written by another version of blt (state version "
            f"{description['version']}, this one reads {VERSION}); start anew with --fresh"
        )
    _check_description(description)
    for name, (size, checksum) in description["files"].items():
        path = folder / name
        if path.stat().st_size != size or _checksum(path) != checksum:
            raise ValueError(f"{name} is not what was written")
    tensors = load_file(folder / TENSORS)
    fields = {k: description[k] for k in _KINDS if k != "files"}
    fields["scored"] = description.get("scored", True)  # older states were all scored
    state = TrainingState(**fields, generator=tensors.pop("generator"), rest=tensors)
    if state.folder_name != folder.name:
        raise ValueError(f"{DESCRIPTION} is that of {state.name}")
    return state


def _check_description(description: dict[str, Any]) -> None:
    """Raise ValueError or KeyError for one that is not what was written."""
    wrong = [key for key, kind in _KINDS.items() if not isinstance(description[key], kind)]
    # States of programs before the checksum have none.
    checksum = description.pop("checksum", None)
    if wrong or checksum not in (None, _own_checksum(description)):
        raise ValueError(f"{DESCRIPTION} is not what was written")
    if TENSORS not in description["files"]:
        raise ValueError(f"{DESCRIPTION} does not tell of {TENSORS}")


def _own_checksum(description: Mapping[str, Any]) -> int:
    """Of a description without it, however it is laid out."""
    return zlib.crc32(json.dumps(description, sort_keys=True).encode())


def _checksum(path: Path) -> int:
    value = 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            value = zlib.crc32(chunk, value)
    return value


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
