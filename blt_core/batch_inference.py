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
import hashlib
import itertools
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import attrs
import torch

from blt_core.errors import DataError, EngineError, RequestError, RunError
from blt_core.execution import AtHand, Executor, Here, Tell, Workers, threads_of
from blt_core.faults import broken
from blt_core.files import parse_json
from blt_core.storage.folders import file_errors
from blt_core.storage.partial import PartialResults
from blt_core.types import seed_of_prompt

if TYPE_CHECKING:
    from blt_core.pipeline import Pipeline
    from blt_core.wiring.config import Config

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
    def pipeline(self) -> Pipeline:
        """What does it."""
        ...

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
    ``samples`` one a text. The workers of the config's ``[executor]`` do the batches, each with a
    pipeline of its own; without one this process does. watch: told (items done, items in all). What
    is done is kept in ``OUTPUT.partial`` until all is; the same call goes on. Raises DataError for
    files that cannot be read, for an ``output`` that is there, and for a partial one of other
    settings, another number of torch's threads, or another choice of kernels.
    """
    make = partial(_Generating, samples=samples, logprobs=logprobs)
    return _run(make(pipeline), make, Path(prompts), Path(output), batch, watch)


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
    make = partial(_Scoring, top=top)
    return _run(make(pipeline), make, Path(texts), Path(output), batch, watch)


class _Generating:
    def __init__(self, pipeline: Pipeline, samples: int | None, logprobs: int | None) -> None:
        self.pipeline, self._seed = pipeline, pipeline.settings.seed
        self._samples, self._logprobs = samples, logprobs
        self.settings = {
            "work": "generate",
            **_settings(pipeline),
            "samples": samples,
            "logprobs": logprobs,
        }

    def read(self, record: Mapping[str, Any]) -> tuple[bytes, bytes]:
        prompt = _bytes_of(record, "prompt")
        self.pipeline.check([prompt], samples=self._samples, logprobs=self._logprobs)
        return prompt, b""

    def run(self, items: Sequence[Item]) -> list[list[Record]]:
        found = self.pipeline.generate(
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
        self.pipeline, self._top = pipeline, top
        self.settings = {"work": "score", **_settings(pipeline), "top": top}

    def read(self, record: Mapping[str, Any]) -> tuple[bytes, bytes]:
        has_prompt = any(name in record for name in ("prompt", "prompt_base64"))
        return _bytes_of(record, "prompt") if has_prompt else b"", _bytes_of(record, "text")

    def run(self, items: Sequence[Item]) -> list[list[Record]]:
        prompts, texts = zip(*(item.asks for item in items), strict=True)
        found = self.pipeline.score(texts, prompts=prompts, top=self._top)
        return [[each.to_dict()] for each in found]


def _settings(pipeline: Pipeline) -> Record:
    """What the results of a pipeline depend on: config, weights, and the library of the kernels."""
    config = json.loads(json.dumps(pipeline.plan.describe(), default=str))
    for told_by_digest in ("checkpoint", "kernels"):  # wherever they are kept
        config.get("run", {}).pop(told_by_digest, None)
    config.pop("executor", None)  # whoever does the work, results are the same
    return {
        "config": config,
        "model": pipeline.model.digest(),
        "kernels": json.loads(pipeline.model.kernel_choice or "null"),
        "torch": torch.__version__,
    }


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


# -- the workers ---------------------------------------------------------------------------------


@attrs.frozen
class _Begin:
    """Makes the work in a worker: that of this process, or anew from the config of a pipeline.

    settings: all that the results depend on; a worker where these are others refuses to work.
    """

    at_hand: AtHand[Work]
    config: Config
    work: Callable[[Pipeline], Work]
    settings: Mapping[str, Any]

    def __call__(self, tell: Tell) -> Callable[[Sequence[Item]], list[list[Record]]]:
        """Batches in, records out."""
        from blt_core.pipeline import Pipeline

        work = self.at_hand.value
        if work is None:
            work = self.work(Pipeline.load(self.config))
        if wrong := [key for key, value in self.settings.items() if work.settings[key] != value]:
            raise RunError(
                f"a worker has another {' and '.join(wrong)} than the process that it works for\n"
                "  fix: give all machines the same files, packages and plugins"
            )
        return partial(_served, work)


def _workers(
    executor: Executor | None, work: Work, make: Callable[[Pipeline], Work]
) -> AbstractContextManager[Workers]:
    """The workers of an executor, or this process."""
    if executor is None:
        return nullcontext(Here(lambda _tell: partial(_served, work)))
    config = work.pipeline.config_for_workers()
    return executor.start(_Begin(AtHand(work), config, make, work.settings))


# -- the run -------------------------------------------------------------------------------------


def _run(
    work: Work,
    make: Callable[[Pipeline], Work],
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
    plan = work.pipeline.plan
    executor: Executor | None = plan.build("executor") if "executor" in plan.nodes else None
    threads = threads_of(executor)
    head = {"format": FORMAT, "items": name, "batch": batch, "threads": threads, **work.settings}
    tally = _Tally(total, watch)
    with PartialResults(target.with_name(f"{target.name}.partial"), head) as kept:
        windows: dict[int, int] = {}  # of the batches that are under way, by number
        left = _left(_windows(_read(source, work), batch * WINDOW), batch, kept, windows, tally)
        with _workers(executor, work, make) as workers:
            for number, found in workers.run(left):
                if number not in windows:
                    text = f"gave a result of task {number}, which it was not given, or twice"
                    raise broken(workers, text, "executor.results")
                kept.append(windows.pop(number), found)
                tally.count(found)
            if windows:
                text = f"gave no result of {len(windows)} tasks"
                raise broken(workers, text, "executor.results")
        kept.finish(target)
    return Outcome(tally.done, tally.failed, tally.first, time.monotonic() - began)


def _left(
    windows: Iterator[list[Item]],
    batch: int,
    kept: PartialResults,
    under_way: dict[int, int],
    tally: _Tally,
) -> Iterator[list[Item]]:
    """The batches that are yet to be done, their windows noted; those that are kept are counted."""
    count = itertools.count()
    for number, window in enumerate(windows):
        for group in _batches(window, batch):
            found = kept.get([item.index for item in group])
            if found is None:
                under_way[next(count)] = number
                yield group
            else:
                tally.count(found)


class _Tally:
    """How many items are done, how many of them failed, and the first of these."""

    def __init__(self, total: int, watch: Callable[[int, int], None] | None) -> None:
        self._total, self._watch = total, watch
        self.done, self.failed, self.first = 0, 0, ""

    def count(self, found: Sequence[Sequence[Record]]) -> None:
        for [record, *_] in found:
            if "error" in record:
                self.failed += 1
                self.first = self.first or f"line {record['index'] + 1}: {record['error']}"
        self.done += len(found)
        if self._watch is not None:
            self._watch(self.done, self._total)


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
