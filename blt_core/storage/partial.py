"""Results of a long run, batch by batch, until all of them are there."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shlex
from array import array
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

from blt_core.errors import DataError, RunError
from blt_core.files import to_json
from blt_core.storage.folders import file_errors, lock, replace_file

if TYPE_CHECKING:
    from typing_extensions import Self

Record = dict[str, Any]


class PartialResults:
    """What is done so far, in a file: a line with the settings, and then one for each batch.

    Batches come in any order; each belongs to a window, and windows follow one another. A record is
    a mapping with the ``index`` of its item; an item has one or several. Raises DataError for a
    file of other settings, or that is none of its kind.
    """

    def __init__(self, path: Path, head: Mapping[str, Any]) -> None:
        self._path, self._head = path, _dumped(head)
        self._found: dict[bytes, _Place] = {}

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as stack, file_errors(self._path, RunError):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file: BinaryIO = stack.enter_context(self._path.open("a+b"))
            lock(self._file, self._path)
            self._begin()
            self._open = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def _begin(self) -> None:
        """Hold the settings of a file that is gone on with; write those of a new one."""
        self._file.seek(0)
        line = self._file.readline()
        if line == self._head:
            self._read()
        elif line.endswith(b"\n"):
            raise DataError(f"{self._path}: {self._other(line)}")
        elif self._head.startswith(line):
            self._file.truncate(0)
            self._write(self._head)
        else:
            raise DataError(f"{self._path}: {_NOT_OURS}")

    def _other(self, line: bytes) -> str:
        """What is wrong with a file that begins with ``line``."""
        try:
            before, now = json.loads(line), json.loads(self._head)
            keys = [key for key in {**before, **now} if before.get(key) != now.get(key)]
            _ = before["format"]
        except (ValueError, TypeError, KeyError):
            return _NOT_OURS
        told = ", ".join(_difference(key, before.get(key), now.get(key)) for key in keys)
        return (
            f"was begun with other settings ({told})\n"
            f"  fix: {how_to_restore(keys, before, self._path)}, or remove it to begin anew"
        )

    def _read(self) -> None:
        """Find the batches that are there whole; what follows a damaged one is made again."""
        while line := self._file.readline():
            start = self._file.tell() - len(line)
            try:
                batch = json.loads(line) if line[-1:] == b"\n" else {}
                key = _key([records[0]["index"] for records in batch["records"]])
                self._found[key] = _Place(batch["window"], start)
            except (ValueError, TypeError, LookupError):
                self._file.truncate(start)
                break

    def get(self, indices: Sequence[int]) -> list[list[Record]] | None:
        """The records of the batch of these items, if it is done."""
        place = self._found.get(_key(indices))
        return None if place is None else self._records(place)

    def _records(self, place: _Place) -> list[list[Record]]:
        self._file.seek(place.offset)
        records: list[list[Record]] = json.loads(self._file.readline())["records"]
        return records

    def append(self, window: int, found: Sequence[Sequence[Record]]) -> None:
        """Keep the records of a batch."""
        key = _key([records[0]["index"] for records in found])
        self._found[key] = _Place(window, self._file.seek(0, os.SEEK_END))
        self._write(_dumped({"window": window, "records": found}))

    def _write(self, data: bytes) -> None:
        with file_errors(self._path, RunError):
            self._file.write(data)
            self._file.flush()

    def finish(self, target: Path) -> None:
        """Write all records in the order of their items, and go."""
        places = sorted(self._found.values())
        with file_errors(target, RunError):
            with replace_file(target) as file:
                for _, window in itertools.groupby(places, key=lambda place: place.window):
                    found = [records for place in window for records in self._records(place)]
                    for records in sorted(found, key=lambda records: records[0]["index"]):
                        file.writelines(map(_dumped, records))
            self._path.unlink()


class _Place(NamedTuple):
    """The window of a batch, and where its line begins."""

    window: int
    offset: int


def how_to_restore(keys: Sequence[str], before: Mapping[str, Any], path: Path) -> str:
    """What to do about settings that differ from those that kept results were made under."""
    count, kernels = before.get("threads"), before.get("kernels")
    known = {"threads": count is not None, "kernels": kernels is None or isinstance(kernels, dict)}
    if not keys or not all(known.get(key) for key in keys):
        return "restore these settings"
    fixes = []
    if "threads" in keys:
        fixes.append(f'set OMP_NUM_THREADS={count} or --executor "local threads={count}"')
    if "kernels" in keys:  # those that it was begun with are told in its first line
        asked = "fixed" if kernels is None else shlex.quote(str(path))
        fixes.append(f"set BLT_KERNELS={asked}, without --kernels and [run] kernels")
    return ", and ".join(fixes)


def _difference(key: str, before: object, now: object) -> str:
    """A setting in words, with both values where they are short."""
    if isinstance(before, Mapping) or isinstance(now, Mapping):
        return key
    return f"{key}: {before!r} there, {now!r} now"


def _key(indices: Sequence[int]) -> bytes:
    return array("q", indices).tobytes()


_NOT_OURS = "holds no results of batch inference\n  fix: choose another output"


def _dumped(value: object) -> bytes:
    return to_json(value).encode() + b"\n"
