"""Indexes that are kept: tensors and a checksum in a safetensors file, beside the corpus or not.

Axes: f files, d documents.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import attrs
import numpy as np
import numpy.typing as npt

from blt_core.log import logger
from blt_core.storage.folders import cache_folder, replace_file
from blt_plugins.training.corpora.cache import alone_with, make_private
from blt_plugins.training.corpora.files import INDEX_FOLDER
from blt_plugins.training.corpora.index import Entries, Found, Reader, merged
from blt_plugins.training.corpora.indexing import find_all
from blt_plugins.training.corpora.sources import labels_of, stamps_of
from blt_plugins.training.corpora.urls import hash_of, shown

#: The version of this format.
VERSION = 2
Check = Literal["stat", "full"]
#: Local texts of less than this, in fewer files, are read as quickly as their index is checked.
SMALL_BYTES, SMALL_FILES = 1 << 24, 1000

_TENSORS: Mapping[str, Any] = {
    "labels": np.uint8,  # UTF-8, each ended by a zero byte
    "since": np.int64,  # (1,)
    "stamps": np.int64,  # (f, 3)
    "counts": np.int64,  # (f,): documents of each file
    "sizes": np.int64,  # (d,), as those below
    "keys": np.uint64,
    "places": np.int64,
}
_WRITTEN_HERE = ("CACHEDIR.TAG", "Signature: 8a477f597d28d172789f06886806bc55\n")
_IGNORED = (".gitignore", "*\n")


@attrs.frozen
class Keeping:
    """How an index is kept. folder: where, None: beside the corpus, or in the cache folder.

    check: ``stat`` trusts files of the same size and times; ``full`` reads them all, unless another
    process has done so after ``since`` (nanoseconds), as process 0 of a run does for the others.
    """

    folder: str | None = None
    check: Check = "stat"
    since: int = attrs.field(factory=time.time_ns)

    def trusted(self, entries: Entries | None) -> Entries | None:
        """``entries``, unless their files are to be read in any case."""
        if self.check == "full" and entries is not None and entries.since < self.since:
            return None
        return entries


def entries_of(reader: Reader, keeping: Keeping, *, workers: int | None = None) -> Entries:
    """The index of a reader's files: what is kept and still true, and the other files read.

    Processes that want the same index make it one after the other, so that the first one reads.
    workers: processes that read; None: as many as there are CPUs. Raises DataError for what is
    unreadable.
    """
    labels, stamps = labels_of(reader.files), stamps_of(reader.files)
    full = keeping.check == "full"
    if keeping.folder is None and reader.files.url is None and _is_small(stamps):
        return _updated(reader, None, labels, stamps, workers, full=full)
    places = _places(reader, keeping)
    seen = [place.version() for place in places]
    old = _best(places, keeping, labels, stamps)
    if old is not None and _covers(old, labels, stamps):
        if lacking := reader.files.lacking(stamps):  # the cache folder was cleared
            find_all(reader, lacking, stamps[lacking, 0].tolist(), workers)
        return old
    for place, version in zip(places, seen, strict=True):
        if not place.prepare():
            continue
        with alone_with(place.path, "indexes this corpus"):
            if place.version() != version:  # another process has made it meanwhile
                old = keeping.trusted(place.load()) or old
            found = _updated(reader, old, labels, stamps, workers, full=full)
            if found is not old:
                place.save(found)
            return found
    logger().warning(
        "the index is not kept", corpus=shown(reader.files.root), reason="no folder for it"
    )
    return _updated(reader, old, labels, stamps, workers, full=full)


@attrs.frozen
class Place:
    """Where one index is kept. of: whose it is, as a hash: the file may be read by others."""

    path: Path
    of: str

    def prepare(self) -> bool:
        """Make the folder; whether a file can be written there."""
        folder = self.path.parent
        try:
            if folder.parent == cache_folder():
                make_private(folder)
            folder.mkdir(parents=True, exist_ok=True)
            for name, text in (_WRITTEN_HERE, _IGNORED) if folder.name == INDEX_FOLDER else ():
                if not (folder / name).exists():
                    (folder / name).write_text(text, encoding="utf-8")
        except OSError:
            return False
        return os.access(folder, os.W_OK)

    def version(self) -> tuple[int, int] | None:
        """What is another one once the file was replaced; None if there is none."""
        try:
            status = self.path.stat()
        except OSError:
            return None
        return status.st_ino, status.st_mtime_ns

    def load(self) -> Entries | None:
        """What is kept; None, with a warning, where it is damaged or another's."""
        try:
            return _read(self.path, self.of) if self.path.exists() else None
        except Exception as error:  # noqa: BLE001 -- whatever is wrong with it, the texts are there
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            logger().warning("the index is made anew", path=str(self.path), reason=reason)
            return None

    def save(self, entries: Entries) -> None:
        """Keep an index; a warning where the disk does not take it."""
        from safetensors.numpy import save

        tensors = _tensors(entries)
        metadata = {"of": self.of, "sha256": _checksum(tensors, self.of)}
        try:
            with replace_file(self.path) as file:
                file.write(save(tensors, metadata))
        except OSError as error:
            reason = error.strerror or str(error)
            logger().warning("the index is not kept", path=str(self.path), reason=reason)


def _is_small(stamps: npt.NDArray[np.int64]) -> bool:
    return len(stamps) < SMALL_FILES and int(stamps[:, 0].sum()) < SMALL_BYTES


def _places(reader: Reader, keeping: Keeping) -> list[Place]:
    """Where the index of a reader may be, in the order in which to look."""
    files = reader.files
    of = {
        "version": VERSION,
        "reader": type(reader).__name__,
        "settings": dict(reader.settings),
        "pattern": files.pattern,
    }
    root = [str(Path(files.root).resolve())]
    if files.url is not None:
        root = [shown(files.root), shown(files.url)]  # whose hosts and archives roots do not tell
    elsewhere = {**of, "root": root}
    if keeping.folder is not None:  # which may lie in that of a corpus
        return [_place(Path(keeping.folder) / INDEX_FOLDER, elsewhere)]
    found = [_place(cache_folder() / "index", elsewhere)]
    if files.url is None:
        found.insert(0, _place(Path(files.root) / INDEX_FOLDER, of))
    return found


def _place(folder: Path, of: Mapping[str, Any]) -> Place:
    own = hash_of(json.dumps(of, sort_keys=True))
    return Place(folder / f"{own[:16]}.safetensors", own)


def _best(
    places: list[Place], keeping: Keeping, labels: list[str], stamps: npt.NDArray[np.int64]
) -> Entries | None:
    """The first trusted one that covers all files, or that which holds true of the most."""
    best, most = None, -1
    for place in places:
        found = keeping.trusted(place.load())
        if found is None:
            continue
        if _covers(found, labels, stamps):
            return found
        true = np.count_nonzero(found.still_true(labels, stamps) >= 0)
        if true > most:
            best, most = found, true
    return best


def _covers(old: Entries, labels: list[str], stamps: npt.NDArray[np.int64]) -> bool:
    """Whether nothing is to be read, nor to be forgotten."""
    return old.labels == labels and bool((old.still_true(labels, stamps) >= 0).all())


def _updated(
    reader: Reader,
    old: Entries | None,
    labels: list[str],
    stamps: npt.NDArray[np.int64],
    workers: int | None,
    *,
    full: bool,
) -> Entries:
    """``old`` itself where it covers all files. full: as of ``Keeping``."""
    if old is not None and _covers(old, labels, stamps):
        return old
    none = np.full(len(labels), -1, dtype=np.int64)
    kept = none if old is None else old.still_true(labels, stamps)
    changed = np.flatnonzero(kept < 0).tolist()
    since = time.time_ns() if old is None else old.since
    if full:
        reader.files.forget(changed)
    fresh = find_all(reader, changed, stamps[changed, 0].tolist(), workers)
    return Entries(labels, stamps, merged(old, kept, fresh), since)


def _read(path: Path, of: str) -> Entries:
    """Raises ValueError, or what safetensors raises, for what is not whole, or of another."""
    from safetensors import safe_open

    with safe_open(str(path), "numpy") as file:
        metadata = file.metadata() or {}
        if metadata.get("of") != of:
            raise ValueError("it is of another corpus, or of another version")
        tensors = {name: file.get_tensor(name) for name in _TENSORS}
    if metadata.get("sha256") != _checksum(tensors, of):
        raise ValueError("its checksum is wrong")
    labels = tensors["labels"].tobytes().decode("utf-8", "surrogateescape").split("\0")[:-1]
    found = Found(*(tensors[name] for name in ("counts", "sizes", "keys", "places")))
    files, documents = len(labels), len(found.sizes)
    fits = (
        all(tensors[name].dtype == kind for name, kind in _TENSORS.items())
        and tensors["since"].shape == (1,)
        and tensors["stamps"].shape == (files, 3)
        and found.counts.shape == (files,)
        and bool((found.counts >= 0).all())
        and found.counts.sum() == documents
        and found.keys.shape == found.places.shape == (documents,)
        and bool((found.sizes > 0).all())
        and bool((found.places >= 0).all())
    )
    if not fits:
        raise ValueError("its parts do not fit each other")
    return Entries(labels, tensors["stamps"], found, int(tensors["since"].item()))


def _tensors(entries: Entries) -> dict[str, npt.NDArray[Any]]:
    text = "".join(f"{label}\0" for label in entries.labels)
    found = entries.found
    tensors = {
        "labels": np.frombuffer(text.encode("utf-8", "surrogateescape"), np.uint8),
        "since": np.array([entries.since], dtype=np.int64),
        "stamps": entries.stamps,
        "counts": found.counts,
        "sizes": found.sizes,
        "keys": found.keys,
        "places": found.places,
    }
    return {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}


def _checksum(tensors: Mapping[str, npt.NDArray[Any]], of: str) -> str:
    total = hashlib.sha256(of.encode())
    for name in _TENSORS:
        total.update(f"{name} {tensors[name].shape} ".encode())
        total.update(tensors[name].data)
    return total.hexdigest()
