"""What a model has answered, kept line by line, so that a run that was stopped goes on."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import attrs
import cattrs

from blt_core.errors import DataError, RunError
from blt_core.evaluation.protocol import Answer
from blt_core.storage.folders import file_errors, lock
from blt_core.storage.partial import how_to_restore
from blt_core.types import Passes, RoundCounts

FORMAT = 2


class Store:
    """A file of JSON Lines: what the answers depend on, and then an answer a line, by its key.

    Without a path nothing outlives the process. Raises DataError for a file whose answers were
    given under other circumstances, or that is none of its kind.
    """

    def __init__(self, path: Path | None, settings: Mapping[str, Any]) -> None:
        self._path = path
        self._found: dict[str, Any] = {}
        self._file: BinaryIO | None = None
        if path is None:
            return
        head = {"format": FORMAT, **settings}
        with file_errors(path, RunError):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("a+b")
            try:
                lock(self._file, path)
                whole = self._read(path, head)
                # A line that was cut short by a kill is written anew.
                self._file.truncate(whole)
            except BaseException:
                self._file.close()
                raise
        if not whole:
            self._write([head])

    def _read(self, path: Path, head: Mapping[str, Any]) -> int:
        """Read what is there; the length of its whole lines."""
        data = path.read_bytes()
        whole = data.rfind(b"\n") + 1
        begins = json.dumps({"format": FORMAT}).encode()[:-1]
        if not begins.startswith(data[: len(begins)]):
            raise DataError(f"{path}: holds no answers of a task\n  fix: choose another --out")
        try:
            lines = [json.loads(line) for line in data[:whole].splitlines()]
            _ = lines and lines[0]["format"]  # other files have none
            self._found = {line["key"]: line for line in lines[1:]}
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"{path}: not read as answers of a task: {error!r}\n"
                "  fix: remove it, or choose another --out"
            ) from error
        if lines and lines[0] != dict(head):
            before = lines[0]
            keys = [key for key in {**before, **head} if before.get(key) != head.get(key)]
            told = "\n".join(
                f"  {k}"
                if k == "kernels"
                else f"  {k}: {before.get(k)!r} there, {head.get(k)!r} now"
                for k in keys
            )
            raise DataError(
                f"{path}: these answers were given under other settings:\n{told}\n"
                f"  fix: {how_to_restore(keys, before, path)}, or choose another --out"
            )
        return whole

    def get(self, key: str) -> Any:
        """What is kept under a key; None if nothing is."""
        return self._found.get(key)

    def put(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Keep records, each under its ``key``."""
        self._found |= {record["key"]: record for record in records}
        self._write(records)

    def _write(self, records: Sequence[Mapping[str, Any]]) -> None:
        if self._file is None or self._path is None:
            return
        lines = "".join(json.dumps(record) + "\n" for record in records)
        with file_errors(self._path, RunError):
            self._file.write(lines.encode())
            self._file.flush()

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()


def to_record(key: str, answer: Answer) -> dict[str, Any]:
    """An answer as a line has it."""
    return {
        "key": key,
        "outputs": [base64.b64encode(output).decode("ascii") for output in answer.outputs],
        "stopped": list(answer.stopped),
        "passes": attrs.asdict(answer.passes),
        "drafted": answer.drafted,
        "accepted": answer.accepted,
        "counts": attrs.asdict(answer.counts),
        "seconds": answer.seconds,
        **({"error": answer.error} if answer.error is not None else {}),
    }


def from_record(record: Mapping[str, Any]) -> Answer:
    """The answer of a line."""
    counts = record["counts"]
    return Answer(
        outputs=tuple(base64.b64decode(output) for output in record["outputs"]),
        stopped=tuple(record["stopped"]),
        passes=cattrs.structure(record["passes"], Passes),
        drafted=record["drafted"],
        accepted=record["accepted"],
        counts=RoundCounts(
            tuple(counts["drafted"]), tuple(counts["accepted"]), counts["committed"]
        ),
        seconds=record["seconds"],
        error=record.get("error"),
    )
