"""Patching ahead of time: the scorer reads a corpus once, and its patches are stored in shards.

Flags are computed on exactly the windows that training cuts, by one thread, so that they are the
ones that training would compute, whatever the number of processes.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from itertools import pairwise
from multiprocessing.connection import wait as wait_for
from pathlib import Path
from typing import Any, Protocol

import attrs
import numpy as np
import torch

from blt_core.errors import ConfigError, DataError, RunError
from blt_core.files import names_in
from blt_core.model import Model
from blt_core.plugins.loading import load_plugins
from blt_core.protocols import Documents
from blt_core.storage.folders import file_errors
from blt_core.wiring.config import Config
from blt_plugins.training.corpora.arrow import arrow
from blt_plugins.training.corpora.patching import patching_of
from blt_plugins.training.corpora.shards import (
    Manifest,
    Row,
    Shard,
    file_digest,
    load_manifest,
    save_manifest,
    shard_metadata,
    shard_path,
    write_shard,
)
from blt_plugins.training.corpora.stored import Split
from blt_plugins.training.corpora.weights import weights_of
from blt_plugins.training.data.windows import Texts, cut_windows, make_batch, pack
from blt_plugins.training.setup.config import load_model, plan_training

SPLITS: tuple[Split, ...] = ("train", "valid")
#: Bytes of one pass of the scorer, and of the documents that are in memory at a time.
BATCH_BYTES, GROUP_BYTES = 16_384, 1_000_000
#: Seconds between two looks at how far the workers are.
GLANCE = 0.2


class Counter(Protocol):
    """Bytes done, by all processes together (``multiprocessing.Value``)."""

    value: int

    def get_lock(self) -> contextlib.AbstractContextManager[Any]:
        """Held while ``value`` is changed."""
        ...


class OwnCounter:
    """The counter of a single process."""

    value = 0

    def get_lock(self) -> contextlib.AbstractContextManager[Any]:
        """Nothing to hold."""
        return contextlib.nullcontext()


@attrs.frozen
class Task:
    """Documents [first, end) of a split, and the path of their shard in the folder."""

    split: Split
    first: int
    end: int
    path: str


@attrs.frozen(eq=False)
class Source:
    """A trained model, the documents to patch, and the length of windows."""

    model: Model
    documents: Mapping[Split, Documents]
    context_bytes: int

    @classmethod
    def load(cls, config: Config) -> Source:
        """That of a training config with a checkpoint. Raises its errors, all at once."""
        training = plan_training(config, load_plugins())
        if training.calibrates:
            text = "missing; patches depend on it, and this checkpoint has none"
            raise ConfigError([training.plan.place.child("patcher", "threshold").problem(text)])
        corpus, model = training.plan.build("corpus"), load_model(training)
        context = training.settings.context_bytes or model.context_bytes
        return cls(model, {split: corpus.documents(split) for split in SPLITS}, context)

    def manifest(self, shard_bytes: int) -> Manifest:
        """What a folder says of it before any shard is done."""
        return Manifest(
            patching=patching_of(self.model, self.context_bytes),
            digests={split: texts.digest for split, texts in self.documents.items()},
            documents={split: len(texts) for split, texts in self.documents.items()},
            weights=[list(pair) for pair in weights_of(self.documents["train"])],
            shard_bytes=shard_bytes,
        )

    def tasks(self, shard_bytes: int) -> list[Task]:
        """The shards to write: runs of documents of about ``shard_bytes``."""
        tasks = []
        for split, texts in self.documents.items():
            shard = (np.cumsum(texts.sizes) - texts.sizes) // shard_bytes
            bounds = [0, *(np.flatnonzero(np.diff(shard)) + 1).tolist(), len(texts)]
            pairs = [(a, b) for a, b in pairwise(bounds) if a < b]
            tasks += [Task(split, a, b, shard_path(split, n)) for n, (a, b) in enumerate(pairs)]
        return tasks


@attrs.frozen
class Prepared:
    """How a run ended. bytes_per_second: of what it did itself, None if nothing was left to do."""

    documents: int
    bytes: int
    patches: int
    mean_patch_bytes: float
    shards: int
    kept: int
    seconds: float
    bytes_per_second: float | None


def prepare(
    config: Config,
    out: Path,
    *,
    workers: int = 1,
    shard_bytes: int = 64_000_000,
    progress: Callable[[int, int], None] = lambda _done, _total: None,
) -> Prepared:
    """Write the corpus of ``config`` and its patches to ``out``, going on where a run was stopped.

    progress: told bytes done and bytes in all. Raises DataError if ``out`` holds something else or
    was made with another configuration, RunError if a worker dies.
    """
    began = time.monotonic()
    arrow()
    source = Source.load(config)
    manifest = _resume(out, source.manifest(shard_bytes))
    tasks = source.tasks(shard_bytes)
    left = [task for task in tasks if task.path not in manifest.shards]
    total = sum(int(texts.sizes.sum()) for texts in source.documents.values())
    before = sum(shard.bytes for shard in manifest.shards.values())
    save_manifest(out, manifest)
    run = (
        _alone(source, out, left) if workers == 1 else _together(config, source, out, left, workers)
    )
    with run as results:
        for done, finished in results:
            if finished is not None:
                task, shard = finished
                manifest = attrs.evolve(manifest, shards={**manifest.shards, task.path: shard})
                save_manifest(out, manifest)
            progress(before + done, total)
    manifest = attrs.evolve(manifest, complete=True)
    save_manifest(out, manifest)
    return _summary(manifest, len(tasks) - len(left), before, time.monotonic() - began)


def _summary(manifest: Manifest, kept: int, before: int, seconds: float) -> Prepared:
    shards = manifest.shards.values()
    size, patches = sum(s.bytes for s in shards), sum(s.patches for s in shards)
    return Prepared(
        documents=sum(s.documents for s in shards),
        bytes=size,
        patches=patches,
        mean_patch_bytes=size / max(patches, 1),
        shards=len(shards),
        kept=kept,
        seconds=seconds,
        bytes_per_second=(size - before) / seconds if size > before else None,
    )


def _resume(out: Path, fresh: Manifest) -> Manifest:
    """The manifest to go on from: shards that are whole are kept."""
    found = load_manifest(out)
    if found is None:
        with file_errors(out, DataError):
            if names_in(out):
                raise DataError(
                    f"{out}: not empty, and no prepared corpus; choose another place (--out)"
                )
        return fresh
    wrong = [key for key, value in fresh.head.items() if found.head[key] != _as_json(value)]
    if wrong:
        raise DataError(
            f"{out}: holds documents that were prepared with other {' and '.join(wrong)}\n"
            "  fix: choose another --out, or remove this folder"
        )
    whole = {
        name: shard
        for name, shard in found.shards.items()
        if (out / name).is_file()
        and (out / name).stat().st_size == shard.file_bytes
        and file_digest(out / name) == shard.sha256
    }
    return attrs.evolve(fresh, shards=whole)


def _as_json(value: object) -> Any:
    """A value as it comes back from a manifest."""
    return json.loads(json.dumps(value))


# -- one shard -----------------------------------------------------------------------------------


def make_shard(source: Source, out: Path, task: Task, counter: Counter) -> Shard:
    """Patch the documents of one task, and write them."""
    documents = source.documents[task.split]

    def groups() -> Iterator[list[Row]]:
        first = task.first
        while first < task.end:
            sizes = np.cumsum(documents.sizes[first : task.end])
            end = first + max(int(np.searchsorted(sizes, GROUP_BYTES, side="right")), 1)
            yield patch_documents(source, documents, range(first, end))
            with counter.get_lock():
                counter.value += int(documents.sizes[first:end].sum())
            first = end

    patching = patching_of(source.model, source.context_bytes)
    metadata = shard_metadata(patching, documents.digest, task.split, task.first)
    return write_shard(out / task.path, groups(), metadata)


@torch.no_grad()
def patch_documents(source: Source, documents: Documents, chosen: range) -> list[Row]:
    """(text, opens, source) of some documents, flags from the windows that training cuts."""
    texts, model = Texts([documents[index] for index in chosen]), source.model
    opens = [np.zeros(size + 1, dtype=bool) for size in texts.sizes.tolist()]
    for group in pack(cut_windows(texts, source.context_bytes), BATCH_BYTES):
        batch = make_batch(texts, group, model.scheme).to(model.device)
        flags = model.patcher.flags(batch.rows, None).cpu().numpy()
        for row, window in zip(flags, group, strict=True):
            end = window.start + window.length
            opens[window.document][window.start : end] = row[: window.length]
    sources = [documents.source(index) for index in chosen]
    return list(zip(texts, opens, sources, strict=True))


# -- processes -----------------------------------------------------------------------------------

#: Bytes done by now, and a task that has just been finished, with its shard.
Result = tuple[int, "tuple[Task, Shard] | None"]


@contextlib.contextmanager
def _alone(source: Source, out: Path, tasks: list[Task]) -> Iterator[Iterator[Result]]:
    """Do all tasks in this process, on one thread, as workers do."""
    counter, threads = OwnCounter(), torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield (
            (counter.value, (task, shard))
            for task in tasks
            for shard in [make_shard(source, out, task, counter)]
        )
    finally:
        torch.set_num_threads(threads)


@contextlib.contextmanager
def _together(
    config: Config, source: Source, out: Path, tasks: list[Task], workers: int
) -> Iterator[Iterator[Result]]:
    """Do the tasks in worker processes, which end with this one, however that ends."""
    context = multiprocessing.get_context("spawn")
    counter = context.Value("q", 0)
    head, others = source.manifest(1).head, set(multiprocessing.active_children())
    executor = ProcessPoolExecutor(
        max(min(workers, len(tasks)), 1), context, _start_worker, (config, head, out, counter)
    )
    try:
        futures = {executor.submit(_work, task): task for task in tasks}
        yield _results(futures, counter)
        executor.shutdown()
    except BrokenProcessPool as error:
        raise RunError(
            "a worker process has ended before its time; what was finished is kept, and the same "
            "command goes on\n  fix: if memory ran out, use fewer --workers"
        ) from error
    finally:
        executor.shutdown(wait=False, cancel_futures=True)
        for process in set(multiprocessing.active_children()) - others:
            process.terminate()


def _results(futures: Mapping[Future[Shard], Task], counter: Counter) -> Iterator[Result]:
    left = set(futures)
    while left:
        done, left = wait(left, GLANCE, FIRST_COMPLETED)
        yield counter.value, None
        for future in done:
            yield counter.value, (futures[future], future.result())


_worker: Callable[[Task], Shard]


def _start_worker(config: Config, head: Mapping[str, Any], out: Path, counter: Counter) -> None:
    """Load what a worker needs, once."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the first process sees to it
    _end_with_parent()
    torch.set_num_threads(1)
    source = Source.load(config)
    if source.manifest(1).head != head:
        raise DataError("the corpus or the checkpoint changed in the meantime")
    global _worker  # noqa: PLW0603 -- how an initializer hands on what it made
    _worker = lambda task: make_shard(source, out, task, counter)  # noqa: E731


def _work(task: Task) -> Shard:
    return _worker(task)


def _end_with_parent() -> None:
    """End this process when its parent has ended, even by SIGKILL, since no work will come."""
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def watch() -> None:
        wait_for([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
