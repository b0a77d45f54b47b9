"""What is known of each document without its text, file by file, so that files can be kept.

Axes: f files, d documents.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import attrs
import numpy as np
import numpy.typing as npt

from blt_plugins.training.corpora.sources import UNSETTLED, Files, Stamps
from blt_plugins.training.corpora.unwanted import check_wanted

#: Documents after which it is looked whether they are still wanted.
_GLANCE = 1000

Ints = npt.NDArray[np.int64]
Keys = npt.NDArray[np.uint64]


@attrs.frozen
class Part:
    """What is read in one go: of a file, from one place to another; ``end`` None: to its end."""

    file: int
    begin: int = 0
    end: int | None = None


class Reader(Protocol):
    """Reads the documents of some files; a document has a file's number and a place in it.

    settings: the arguments beside the files that make the same reader, in plain values for JSON.
    any_order: as of :class:`blt_core.protocols.ScatteredDocuments`.
    """

    files: Files
    settings: Mapping[str, Any]
    any_order: bool

    def parts(self, file: int, file_bytes: int, most: int) -> Sequence[Part]:
        """A file in parts of about ``most`` bytes, where it can be read so."""
        ...

    def scan(self, part: Part) -> Iterator[tuple[int, bytes]]:
        """(place, text) of all documents of a part, in order; DataError for what is unreadable."""
        ...

    def texts(self, file: int, places: Iterable[int]) -> Iterator[bytes]:
        """The texts of some documents of a file."""
        ...

    def name(self, file: int, place: int) -> str:
        """What to call a document."""
        ...


@attrs.frozen(eq=False)
class Index:
    """All that is kept in memory of each document: 32 bytes.

    sizes: int64, in bytes. keys: uint64, the first 8 bytes of the text's SHA-256. files, places:
    int64, where to read it.
    """

    sizes: Ints
    keys: Keys
    files: Ints
    places: Ints

    def where(self, taken: npt.NDArray[np.bool_]) -> Index:
        """The documents where ``taken`` is True."""
        return Index(self.sizes[taken], self.keys[taken], self.files[taken], self.places[taken])

    def split(self, percent: float) -> tuple[Index, Index]:
        """The documents to train on, and about ``percent`` of them held out.

        Of two and more at least one, unless ``percent`` is 0. Those with the smallest keys are held
        out, so copies of a text never lie on both sides.
        """
        share = len(self.keys) * percent / 100
        count = min(max(round(share), 1), len(self.keys) - 1) if share else 0
        held = np.zeros(len(self.keys), bool)
        if count > 0:
            held = self.keys < np.partition(self.keys, count)[count]
        return self.where(~held), self.where(held)


@attrs.frozen(eq=False)
class Found:
    """The documents of some parts, in order. counts: of each part; the rest as in ``Index``."""

    counts: Ints
    sizes: Ints
    keys: Keys
    places: Ints

    @classmethod
    def joined(cls, parts: Iterable[Found]) -> Found:
        """Those of several, one after the other."""
        rows = [attrs.astuple(part, recurse=False) for part in parts]
        empty = (*(np.zeros(0, np.int64),) * 2, np.zeros(0, np.uint64), np.zeros(0, np.int64))
        return cls(*(np.concatenate(each) for each in zip(empty, *rows, strict=True)))


def key_of(text: bytes) -> int:
    """The first 8 bytes of a text's SHA-256, as a number."""
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "big")


def find(reader: Reader, parts: Iterable[Part]) -> Found:
    """Read the documents of some parts, one at a time. Empty ones are left out."""
    counts, sizes, places, keys = array("q"), array("q"), array("q"), array("Q")
    for part in parts:
        before = len(sizes)
        for place, text in reader.scan(part):
            if not len(sizes) % _GLANCE:
                check_wanted()
            if text:
                sizes.append(len(text))
                keys.append(key_of(text))
                places.append(place)
        counts.append(len(sizes) - before)
    signed = (np.array(each, dtype=np.int64) for each in (counts, sizes, places))
    counts_p, sizes_d, places_d = signed
    return Found(counts_p, sizes_d, np.array(keys, dtype=np.uint64), places_d)


@attrs.frozen(eq=False)
class Entries:
    """An index that can be kept: its files, as they were when they were read, and what they hold.

    labels, stamps: of the files, see :class:`~blt_plugins.training.corpora.sources.Files`. found:
    a part is a file. since: all files were read after that; nanoseconds.
    """

    labels: list[str]
    stamps: Stamps
    found: Found
    since: int

    def index(self) -> Index:
        """The documents of all files."""
        found = self.found
        files = np.repeat(np.arange(len(found.counts)), found.counts)
        return Index(found.sizes, found.keys, files, found.places)

    def still_true(self, labels: list[str], stamps: Stamps) -> Ints:
        """For each of these files its number here, or -1 if it is new, changed or may have changed.

        int64 (f,).
        """
        if self.labels == labels:
            own = np.arange(len(labels))
        else:
            numbers = {label: number for number, label in enumerate(self.labels)}
            own = np.array([numbers.get(label, -1) for label in labels], dtype=np.int64)
        if not len(self.labels):
            return own
        same = (self.stamps[own] == stamps).all(1) & (self.stamps[own, 2] != UNSETTLED)
        return np.where(same & (own >= 0), own, -1)


def merged(old: Entries | None, kept: Ints, fresh: Found) -> Found:
    """What all files hold. kept: of ``still_true``; fresh: of the files without a number there."""
    parts = [fresh] if old is None else [old.found, fresh]
    pool = Found.joined(parts)
    number = np.where(kept >= 0, kept, 0)
    number[kept < 0] = len(pool.counts) - len(fresh.counts) + np.arange(len(fresh.counts))
    counts = pool.counts[number]
    first = (np.cumsum(pool.counts) - pool.counts)[number]
    # Row i of a file's documents is row first + i of the pool.
    rows = np.repeat(first - (np.cumsum(counts) - counts), counts) + np.arange(counts.sum())
    return Found(counts, pool.sizes[rows], pool.keys[rows], pool.places[rows])
