"""Patching ahead of time: the scorer reads a corpus once, and its patches are stored in shards.

Flags are computed on exactly the windows that training cuts, by one thread, so that they are the
ones that training would compute, whatever the number of processes.
"""

from __future__ import annotations

import contextlib
import json
import tempfile
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import torch

from blt_core.errors import ConfigError, DataError
from blt_core.execution import AtHand, Executor, Tell, check_torch, torch_threads
from blt_core.faults import broken
from blt_core.files import names_in
from blt_core.model import Model
from blt_core.plugins.loading import load_plugins
from blt_core.protocols import Documents
from blt_core.storage.folders import file_errors
from blt_core.wiring.config import Config
from blt_core.wiring.resolve import Plan
from blt_plugins.training.corpora.arrow import arrow
from blt_plugins.training.corpora.patching import patching_of
from blt_plugins.training.corpora.pieces import texts_of
from blt_plugins.training.corpora.shards import (
    Manifest,
    Row,
    Shard,
    file_digest,
    load_manifest,
    replaced,
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


@attrs.frozen
class Task:
    """Documents [first, end) of a split, and the path of their shard in the folder."""

    split: Split
    first: int
    end: int
    path: str


@attrs.frozen(eq=False)
class Source:
    """A trained model, the documents to patch, and the length of windows; plan: of the config."""

    plan: Plan
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
        return cls(
            training.plan, model, {split: corpus.documents(split) for split in SPLITS}, context
        )

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
    shard_bytes: int = 64_000_000,
    progress: Callable[[int, int], None] = lambda _done, _total: None,
) -> Prepared:
    """Write the corpus of ``config`` and its patches to ``out``, going on where a run was stopped.

    The workers of the config's ``[executor]`` patch; without one this process does. progress: told
    bytes done and bytes in all. Raises DataError if ``out`` holds something else or was made with
    another configuration, RunError if workers die too often.
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
    done = before

    def tell(amount: int) -> None:
        nonlocal done
        done = min(done + amount, total)  # a shard that is done again tells again
        progress(done, total)

    tell(0)
    run = (
        _alone(source, out, left, tell)
        if "executor" not in source.plan.nodes
        else _shards(config, source, out, left, tell)
    )
    with contextlib.closing(run):
        for task, shard in run:
            manifest = attrs.evolve(manifest, shards={**manifest.shards, task.path: shard})
            save_manifest(out, manifest)
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


def make_shard(source: Source, out: Path, task: Task, tell: Tell) -> Shard:
    """Patch the documents of one task, and write them."""
    documents = source.documents[task.split]

    def groups() -> Iterator[list[Row]]:
        first = task.first
        while first < task.end:
            sizes = np.cumsum(documents.sizes[first : task.end])
            end = first + max(int(np.searchsorted(sizes, GROUP_BYTES, side="right")), 1)
            yield patch_documents(source, documents, range(first, end))
            tell(int(documents.sizes[first:end].sum()))
            first = end

    patching = patching_of(source.model, source.context_bytes)
    metadata = shard_metadata(patching, documents.digest, task.split, task.first)
    return write_shard(out / task.path, groups(), metadata)


@torch.no_grad()
def patch_documents(source: Source, documents: Documents, chosen: range) -> list[Row]:
    """(text, opens, source) of some documents, flags from the windows that training cuts."""
    texts, model = Texts(list(texts_of(documents, np.array(chosen)))), source.model
    opens = [np.zeros(size + 1, dtype=bool) for size in texts.sizes.tolist()]
    for group in pack(cut_windows(texts, source.context_bytes), BATCH_BYTES):
        batch = make_batch(texts, group, model.scheme).to(model.device)
        flags = model.patcher.flags(batch.rows, None).cpu().numpy()
        for row, window in zip(flags, group, strict=True):
            end = window.start + window.length
            opens[window.document][window.start : end] = row[: window.length]
    sources = [documents.source(index) for index in chosen]
    return list(zip(texts, opens, sources, strict=True))


# -- workers -------------------------------------------------------------------------------------


@attrs.frozen
class Begin:
    """Makes what a worker does with a task: the shard, and the bytes of its file.

    head: what the manifest says of the source; a worker that finds another one refuses to work.
    """

    at_hand: AtHand[Source]
    config: Config
    head: Mapping[str, Any]
    version: str = torch.__version__

    def __call__(self, tell: Tell) -> Callable[[Task], tuple[Shard, bytes]]:
        """A source of the worker's own, or that of this process."""
        check_torch(self.version)
        source = self.at_hand.value
        if source is None:
            source = Source.load(self.config)
        if source.manifest(1).head != self.head:
            raise DataError(
                "a worker finds another corpus or checkpoint than the process that it works for\n"
                "  fix: give all machines the same files, and change none of them meanwhile"
            )
        return partial(_shard_bytes, source, tell)


def _shard_bytes(source: Source, tell: Tell, task: Task) -> tuple[Shard, bytes]:
    # On one thread, whatever the executor has, as training computes its patches.
    with torch_threads(1), tempfile.TemporaryDirectory(prefix="blt-") as folder:
        shard = make_shard(source, Path(folder), task, tell)
        return shard, (Path(folder) / task.path).read_bytes()


def _shards(
    config: Config, source: Source, out: Path, tasks: list[Task], tell: Tell
) -> Generator[tuple[Task, Shard], None, None]:
    """The shards that are done, each with its task; their files lie in the folder.

    Workers of this machine and of others do the same: what they make comes back to be written.
    """
    executor: Executor = source.plan.build("executor")
    missing = set(range(len(tasks)))
    begin = Begin(AtHand(source), config, source.manifest(1).head)
    with executor.start(begin) as workers:
        for number, (shard, data) in workers.run(tasks, tell):
            with replaced(out / tasks[number].path) as fresh:
                fresh.write_bytes(data)
            missing.discard(number)
            yield tasks[number], shard
        if missing:
            raise broken(executor, f"gave no result of {len(missing)} tasks", "executor.results")


def _alone(
    source: Source, out: Path, tasks: list[Task], tell: Tell
) -> Generator[tuple[Task, Shard], None, None]:
    """The same by this process, on one thread, as workers do, and with no detour."""
    with torch_threads(1):
        for task in tasks:
            yield task, make_shard(source, out, task, tell)
