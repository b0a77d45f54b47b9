"""Many prompts or texts of a file, in batches: results in the order of the items.

>>> pipeline = Pipeline.from_toml("run.toml")  # doctest: +SKIP
>>> generate_file(pipeline, "prompts.jsonl", "texts.jsonl", batch=32)  # doctest: +SKIP

Which items share a batch depends on the file and the batch size alone, and the draws of an item on
its place in the file: a run that was stopped goes on, does again what was cut short, and ends with
the same records. An item that cannot be served gets a record with ``error``, and the rest go on.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import hashlib
import itertools
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Protocol

import attrs
import torch

from blt_core.errors import DataError, EngineError, RequestError, RunError
from blt_core.files import parse_json, to_json
from blt_core.storage.folders import file_errors, lock, replace_file
from blt_core.types import seed_of_prompt

if TYPE_CHECKING:
    from typing_extensions import Self

    from blt_core.pipeline import Pipeline

#: Batches whose items are sorted by length together: more are of more even length, fewer are told
#: sooner and need less memory.
WINDOW = 64
FORMAT = 1

Record = dict[str, Any]


@attrs.frozen
class Item:
    """A line of the file: its place from 0 on, its ``id`` if it has one, and what it asks.

    size: bytes, by which batches are made up. error: why it cannot be served.
    """

    index: int
    named: Record
    asks: tuple[bytes, bytes] = (b"", b"")
    size: int = 0
    error: str | None = None


@attrs.frozen
class Outcome:
    """How many items there were, how many of them have an error, and the first of these."""

    items: int
    failed: int
    first: str
    seconds: float


class Work(Protocol):
    """What is done with items."""

    @property
    def settings(self) -> Mapping[str, Any]:
        """All that the results depend on, beside the items."""
        ...

    def read(self, record: Mapping[str, Any]) -> tuple[bytes, bytes]:
        """(prompt, text) of an item; ValueError or RequestError for what cannot be served."""
        ...

    def run(self, items: Sequence[Item]) -> list[list[Record]]:
        """The records of each item of a batch."""
        ...


def generate_file(
    pipeline: Pipeline,
    prompts: str | Path,
    output: str | Path,
    *,
    batch: int = 1,
    samples: int | None = None,
    logprobs: int | None = None,
    watch: Callable[[int, int], None] | None = None,
) -> Outcome:
    """Continue each prompt of a file of JSON Lines; the records go to ``output``, in their order.

    An item is an object with ``prompt``, or ``prompt_base64`` for bytes that are no UTF-8, and
    maybe ``id``; a record has ``index``, that ``id`` and the fields of ``Generation.to_dict``, with
    ``samples`` one a text. watch: told (items done, items in all). What is done is kept in
    ``OUTPUT.partial`` until all is; the same call goes on. Raises DataError for files that cannot
    be read, for an ``output`` that is there, and for a partial one of other settings.
    """
    work = _Generating(pipeline, samples, logprobs)
    return _run(work, Path(prompts), Path(output), batch, watch)


def score_file(
    pipeline: Pipeline,
    texts: str | Path,
    output: str | Path,
    *,
    batch: int = 1,
    top: int = 0,
    watch: Callable[[int, int], None] | None = None,
) -> Outcome:
    """Score each text of a file of JSON Lines, as ``generate_file`` continues prompts.

    An item is an object with ``text`` (or ``text_base64``), maybe ``prompt`` (or
    ``prompt_base64``), which is read and not scored, and maybe ``id``; a record has ``index``, that
    ``id`` and the fields of ``Score.to_dict``.
    """
    return _run(_Scoring(pipeline, top), Path(texts), Path(output), batch, watch)


class _Generating:
    def __init__(self, pipeline: Pipeline, samples: int | None, logprobs: int | None) -> None:
        self._pipeline, self._seed = pipeline, pipeline.settings.seed
        self._samples, self._logprobs = samples, logprobs
        self.settings = {
            "work": "generate",
            **_settings(pipeline),
            "samples": samples,
            "logprobs": logprobs,
        }

    def read(self, record: Mapping[str, Any]) -> tuple[bytes, bytes]:
        prompt = _bytes_of(record, "prompt")
        self._pipeline.check([prompt], samples=self._samples, logprobs=self._logprobs)
        return prompt, b""

    def run(self, items: Sequence[Item]) -> list[list[Record]]:
        found = self._pipeline.generate(
            [item.asks[0] for item in items],
            seed=[seed_of_prompt(self._seed, item.index) for item in items],
            samples=self._samples or 1,
            logprobs=self._logprobs,
        )
        if self._samples is None:
            return [[each.to_dict()] for each in found]
        each = self._samples
        return [
            [{"sample": n, **found[first + n].to_dict()} for n in range(each)]
            for first in range(0, len(found), each)
        ]


class _Scoring:
    def __init__(self, pipeline: Pipeline, top: int) -> None:
        self._pipeline, self._top = pipeline, top
        self.settings = {"work": "score", **_settings(pipeline), "top": top}

    def read(self, record: Mapping[str, Any]) -> tuple[bytes, bytes]:
        has_prompt = any(name in record for name in ("prompt", "prompt_base64"))
        return _bytes_of(record, "prompt") if has_prompt else b"", _bytes_of(record, "text")

    def run(self, items: Sequence[Item]) -> list[list[Record]]:
        prompts, texts = zip(*(item.asks for item in items), strict=True)
        found = self._pipeline.score(texts, prompts=prompts, top=self._top)
        return [[each.to_dict()] for each in found]


def _settings(pipeline: Pipeline) -> Record:
    """What the results of a pipeline depend on: config, weights, and the library of the kernels."""
    config = json.loads(json.dumps(pipeline.plan.describe(), default=str))
    # The weights are told by their digest, wherever they are.
    config.get("run", {}).pop("checkpoint", None)
    return {"config": config, "model": pipeline.model.digest(), "torch": torch.__version__}


def _bytes_of(record: Mapping[str, Any], name: str) -> bytes:
    """The bytes of ``name``, or of ``name_base64``; ValueError if neither gives any."""
    encoded = f"{name}_base64"
    if (name in record) == (encoded in record):
        raise ValueError(f"expected one of the keys {name!r} and {encoded!r}")
    value = record.get(name, record.get(encoded))
    if not isinstance(value, str):
        raise ValueError(f"{name}: expected a string, got {type(value).__name__}")  # noqa: TRY004
    try:
        return value.encode() if name in record else base64.b64decode(value, validate=True)
    except (UnicodeEncodeError, binascii.Error) as error:
        raise ValueError(f"{name}: {error}") from error


# -- the run -------------------------------------------------------------------------------------


def _run(
    work: Work,
    source: Path,
    target: Path,
    batch: int,
    watch: Callable[[int, int], None] | None,
) -> Outcome:
    if batch < 1:
        raise RequestError(f"batch: expected a whole number, 1 or more, got {batch!r}")
    began, (name, total) = time.monotonic(), _look_over(source)
    if target.exists():
        raise DataError(
            f"{target}: is there already\n  fix: move it away, or choose another output"
        )
    head = {"format": FORMAT, "items": name, "batch": batch, **work.settings}
    done, failed, first = 0, 0, ""
    with _Partial(target.with_name(f"{target.name}.partial"), head) as partial:
        for number, window in enumerate(_windows(_read(source, work), batch * WINDOW)):
            for group in _batches(window, batch):
                found = partial.next(group)
                if found is None:
                    found = _served(work, group)
                    partial.append(number, found)
                for [record, *_] in found:
                    if "error" in record:
                        failed += 1
                        first = first or f"line {record['index'] + 1}: {record['error']}"
                done += len(group)
                if watch is not None:
                    watch(done, total)
        partial.finish(target)
    return Outcome(done, failed, first, time.monotonic() - began)


def _look_over(path: Path) -> tuple[str, int]:
    """(a digest of a file, its lines); DataError if it cannot be read, or has none."""
    name, lines, last = hashlib.blake2b(digest_size=16), 0, b"\n"
    with file_errors(path, DataError), path.open("rb") as file:
        while block := file.read(1 << 20):
            name.update(block)
            lines += block.count(b"\n")
            last = block[-1:]
    lines += last != b"\n"
    if not lines:
        raise DataError(f"{path}: has no items")
    return name.hexdigest(), lines


def _read(path: Path, work: Work) -> Iterator[Item]:
    with file_errors(path, DataError), path.open("rb") as file:
        for index, line in enumerate(file):
            yield _item(index, line, work)


def _item(index: int, line: bytes, work: Work) -> Item:
    named: Record = {}
    try:
        record = _object(line)
        named = {"id": record["id"]} if "id" in record else {}
        asks = work.read(record)
    except (ValueError, RequestError) as error:
        return Item(index, named, error=str(error))
    return Item(index, named, asks, sum(map(len, asks)))


def _object(line: bytes) -> Record:
    record = parse_json(line)
    if not isinstance(record, dict):
        raise ValueError(f"expected an object, got {type(record).__name__}")  # noqa: TRY004
    return record


def _windows(items: Iterator[Item], size: int) -> Iterator[list[Item]]:
    while window := list(itertools.islice(items, size)):
        yield window


def _batches(window: Sequence[Item], size: int) -> Iterator[list[Item]]:
    """Those that cannot be served; then batches of similar length."""
    if wrong := [item for item in window if item.error is not None]:
        yield wrong
    right = sorted((item for item in window if item.error is None), key=lambda item: item.size)
    for start in range(0, len(right), size):
        yield right[start : start + size]


def _served(work: Work, items: Sequence[Item]) -> list[list[Record]]:
    """The records of each item; where a batch fails, its items are tried alone."""
    try:
        found = [[{"error": item.error}] for item in items if item.error] or work.run(items)
    except (RequestError, EngineError, RunError) as error:
        if len(items) > 1:
            return [records for item in items for records in _served(work, [item])]
        found = [[{"error": str(error)}]]
    return [
        [{"index": item.index, **item.named, **record} for record in records]
        for item, records in zip(items, found, strict=True)
    ]


class _Partial:
    """What is done so far: a line with the settings, and then one for each batch.

    Raises DataError for a file of other settings, or that is none of its kind.
    """

    def __init__(self, path: Path, head: Mapping[str, Any]) -> None:
        self._path, self._head, self._offset = path, _dumped(head), 0

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
            self._offset = len(line)
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
        return (
            f"was begun with other settings ({', '.join(keys)})\n"
            "  fix: restore them, or remove it to begin anew"
        )

    def next(self, items: Sequence[Item]) -> list[list[Record]] | None:
        """The records of the next batch, if it is there whole; else nothing follows any more."""
        self._file.seek(self._offset)
        line = self._file.readline()
        try:
            found: list[list[Record]] = json.loads(line)["records"] if line[-1:] == b"\n" else []
            indices = [records[0]["index"] for records in found]
        except (ValueError, TypeError, LookupError):  # damaged: made again
            indices = []
        if indices == [item.index for item in items]:
            self._offset += len(line)
            return found
        self._file.truncate(self._offset)
        return None

    def append(self, window: int, found: Sequence[Sequence[Record]]) -> None:
        """Keep the records of a batch."""
        self._write(_dumped({"window": window, "records": found}))

    def _write(self, data: bytes) -> None:
        with file_errors(self._path, RunError):
            self._file.write(data)
            self._file.flush()
        self._offset += len(data)

    def finish(self, target: Path) -> None:
        """Write all records in the order of their items, and go."""
        self._file.seek(0)
        self._file.readline()
        batches = (json.loads(line) for line in self._file)
        with file_errors(target, RunError):
            with replace_file(target) as file:
                for _, window in itertools.groupby(batches, key=lambda batch: batch["window"]):
                    found = [records for batch in window for records in batch["records"]]
                    for records in sorted(found, key=lambda records: records[0]["index"]):
                        file.writelines(map(_dumped, records))
            self._path.unlink()


_NOT_OURS = "holds no results of batch inference\n  fix: choose another output"


def _dumped(value: object) -> bytes:
    return to_json(value).encode() + b"\n"
