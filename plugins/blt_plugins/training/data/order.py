"""The order in which a run reads its windows: a function of the seed and the batch's number.

A pass over the corpus cuts it into *chunks* of consecutive windows, shuffles them, and gathers
them into *pools* of about ``shuffle_bytes``; the windows of a pool are shuffled and packed into
batches. So reading has locality, only one pool of text is in memory, and a corpus that is smaller
than a pool is shuffled whole. Of a pool no more is read than the batches so far have needed, with
what lies near it.
"""

from __future__ import annotations

import hashlib
import math
from bisect import bisect_right
from collections import OrderedDict

import attrs
import numpy as np
import numpy.typing as npt

from blt_core.errors import DataError
from blt_core.protocols import Documents
from blt_core.types import IdScheme
from blt_plugins.training.corpora.pieces import in_any_order, texts_of
from blt_plugins.training.corpora.weights import weights_of
from blt_plugins.training.data.windows import Batch, Ints, Windows, group_bounds, stack

#: Bytes of the text that is shuffled at a time.
SHUFFLE_BYTES = 256_000_000
#: Chunks of a pool.
CHUNKS = 64
#: Bytes of the corpus, of which what belongs to the pool is read together.
PIECE_BYTES = 1 << 18
#: Windows are sorted by length within runs of this many, so that batches need little padding; or
#: within runs of so many batches if that is more, since the last batch of each run is not full.
RUN, RUN_BATCHES = 256, 8
#: What the order of batches is called in a state; a change of the order changes it.
ORDER = 2
#: Documents of a run among which the parts of a pass are spread evenly.
SPREAD = 1024


class Batches:
    """The endless order of batches, pass after pass.

    Raises DataError where a document cannot be read any more.
    """

    def __init__(
        self,
        documents: Documents,
        windows: Windows,
        *,
        scheme: IdScheme,
        batch_bytes: int,
        seed: str,
        shuffle_bytes: int = SHUFFLE_BYTES,
    ) -> None:
        self._documents, self._windows, self._scheme = documents, windows, scheme
        self._batch_bytes, self._seed = batch_bytes, seed
        self._chunks = cut_chunks(documents, windows, max(shuffle_bytes // CHUNKS, 1))
        expected = float((self._chunks.targets * self._chunks.shares).sum())
        self._pools = max(math.ceil(expected / shuffle_bytes), 1)
        self._first = [0]
        self._orders: OrderedDict[int, Pool] = OrderedDict()
        self._text: tuple[int, PoolText] | None = None
        self._room = Room()

    def __getitem__(self, number: int) -> Batch:
        """Batch ``number`` (from 0), from its pool, of which each piece is read once."""
        index, place = self._find(number)
        pool = self._pool(index)
        if self._text is None or self._text[0] != index:
            self._text = None  # let go of the former first
            self._text = index, PoolText(self._documents, self._windows, pool, self._room)
        first, end = pool.groups[place]
        return self._text[1].batch(int(first), int(end), self._scheme)

    def size(self, number: int) -> int:
        """The targets of batch ``number``, without reading any text."""
        index, place = self._find(number)
        pool = self._pool(index)
        first, end = pool.groups[place]
        return int(self._windows.columns(pool.windows[first:end])[2].sum())

    def _find(self, number: int) -> tuple[int, int]:
        """The pool of a batch, counted over all passes, and its place in it."""
        while self._first[-1] <= number:
            pool = self._pool(len(self._first) - 1)
            self._first.append(self._first[-1] + len(pool.groups))
        index = bisect_right(self._first, number) - 1
        return index, number - self._first[index]

    def _pool(self, index: int) -> Pool:
        """The order of one pool; the latest two are kept, for steps that lie in both."""
        if index not in self._orders:
            epoch, place = divmod(index, self._pools)
            windows = self._gather(epoch, place)
            rng = seeded(f"{self._seed}/{epoch}/{place}")
            self._orders[index] = order_windows(windows, self._windows, self._batch_bytes, rng)
            while len(self._orders) > 2:  # noqa: PLR2004 -- as said above
                self._orders.popitem(last=False)
        self._orders.move_to_end(index)
        return self._orders[index]

    def _gather(self, epoch: int, place: int) -> Ints:
        """The windows of the chunks of one pool, in no particular order."""
        chunks = self._chunks
        order = seeded(f"{self._seed}/{epoch}").permutation(len(chunks.copies))
        expected = (chunks.targets * chunks.shares)[order]
        middle = np.cumsum(expected) - expected / 2  # of each chunk, as it lies in the pass
        pool_of = (middle * self._pools / expected.sum()).astype(int)
        found = [self._take(int(chunk), epoch) for chunk in order[pool_of == place]]
        return np.concatenate([np.zeros(0, dtype=np.int64), *found])

    def _take(self, chunk: int, epoch: int) -> Ints:
        """The windows of a chunk that a pass reads."""
        chunks = self._chunks
        windows = np.arange(chunks.first[chunk], chunks.end[chunk])
        weight = float(chunks.weights[chunk])
        if weight == int(weight):
            return windows  # each pass reads it as often as there are copies of the chunk
        first, count = chunks.parts[chunk].tolist()
        document = self._windows.columns(windows)[0] - first
        shift = phases(document, count, f"{self._seed}/{first}")
        times = np.floor((epoch + 1) * weight + shift) - np.floor(epoch * weight + shift)
        return windows[times > chunks.copies[chunk]]


def seeded(key: str) -> np.random.Generator:
    """A generator that depends on ``key`` alone."""
    return np.random.default_rng(np.frombuffer(hashlib.sha256(key.encode()).digest(), np.uint32))


def phases(documents: Ints, total: int, seed: str) -> npt.NDArray[np.float64]:
    """A number from 0 to 1 for some of ``total`` documents, spread evenly over runs of SPREAD.

    After n passes a document of phase u and weight w was read floor(n · w + u) times.
    """
    found = np.empty(len(documents))
    for run in np.unique(documents // SPREAD):
        rng, first = seeded(f"{seed}/phases/{run}"), run * SPREAD
        count = min(SPREAD, total - first)
        shift = (rng.permutation(count) + rng.random()) / count
        inside = documents // SPREAD == run
        found[inside] = shift[documents[inside] - first]
    return found


@attrs.frozen(eq=False)
class Chunks:
    """Runs of consecutive windows; one that is read several times in a pass has several entries.

    Arrays (chunks,): first, end: the windows; targets: in them; weights: how often a pass reads
    them; copies: which of the readings this is, from 0; shares: how much of it is read then.
    parts (chunks, 2): the first document, and the number of them, that have this weight.
    """

    first: Ints
    end: Ints
    targets: Ints
    weights: npt.NDArray[np.float64]
    copies: Ints
    shares: npt.NDArray[np.float64]
    parts: Ints


def cut_chunks(documents: Documents, windows: Windows, chunk_bytes: int) -> Chunks:
    """The chunks of all windows, in order, each of about ``chunk_bytes`` and one weight."""
    rows: list[Ints] = []
    weights: list[npt.NDArray[np.float64]] = []
    document, ends = 0, np.concatenate([[0], np.cumsum(windows.sizes + 1)])
    for count, weight in weights_of(documents):
        places = np.arange(ends[document], ends[document + count], chunk_bytes)
        bounds = np.unique(windows.from_target(np.append(places, ends[document + count])))
        targets = np.diff(windows.targets_before(bounds))
        for copy in range(math.ceil(weight)):
            constant = (np.full(len(targets), each) for each in (copy, document, count))
            rows.append(np.stack([bounds[:-1], bounds[1:], targets, *constant]))
            weights.append(np.full(len(targets), float(weight)))
        document += count
    first, end, targets, copies, *parts = np.concatenate(rows, axis=1)
    weight_of = np.concatenate(weights)
    shares = np.clip(weight_of - copies, 0, 1)
    return Chunks(first, end, targets, weight_of, copies, shares, np.stack(parts, axis=1))


@attrs.frozen(eq=False)
class Pool:
    """windows: numbers of windows in reading order. groups (batches, 2): the bounds of each."""

    windows: Ints
    groups: Ints


def order_windows(
    numbers: Ints, windows: Windows, batch_bytes: int, rng: np.random.Generator
) -> Pool:
    """Shuffle some windows, and pack those of like length; the batches are in random order."""
    numbers = np.sort(numbers)  # in order they are looked up ten times as fast
    lengths, shuffled = windows.columns(numbers)[2], rng.permutation(len(numbers))
    numbers, lengths = numbers[shuffled], lengths[shuffled]
    groups: list[tuple[int, int]] = []
    size = run_length(lengths, batch_bytes)
    for begin in range(0, len(numbers), size):
        run = slice(begin, begin + size)
        longest = np.argsort(-lengths[run], kind="stable")
        numbers[run], lengths[run] = numbers[run][longest], lengths[run][longest]
        bounds = group_bounds(lengths[run].tolist(), batch_bytes)
        groups += [(begin + first, begin + end) for first, end in bounds]
    bounds_of = np.array(groups, dtype=np.int64).reshape(-1, 2)
    return Pool(numbers, rng.permutation(bounds_of))


def run_length(lengths: Ints, batch_bytes: int) -> int:
    """How many windows of some lengths (bytes) are sorted together."""
    return max(RUN, RUN_BATCHES * batch_bytes * len(lengths) // max(int(lengths.sum()), 1))


class Room:
    """Memory for the text of one pool after another.

    Of memory that is given back and asked for again, an allocator may hold two pools at a time.
    """

    def __init__(self) -> None:
        self._text = np.zeros(0, dtype=np.uint8)

    def of(self, size: int) -> npt.NDArray[np.uint8]:
        """At least ``size`` bytes, which hold what was written there before."""
        if len(self._text) < size:
            self._text = np.zeros(0, dtype=np.uint8)  # let go of the former first
            self._text = np.zeros(size + size // 16, dtype=np.uint8)
        return self._text


class PoolText:
    """The text of a pool, in the order of the corpus, and its patches where the corpus knows them.

    A piece of it is read when a batch first needs a window of that; each document is read once, and
    those of a piece in the order of the corpus. Documents that are not read in any order are one
    piece. The room for it is that of the pool before, which must not be asked any more.
    """

    def __init__(
        self,
        documents: Documents,
        windows: Windows,
        pool: Pool,
        room: Room,
    ) -> None:
        self._documents, self._windows, self._pool = documents, windows, pool
        order = np.argsort(pool.windows, kind="stable")
        numbers = pool.windows[order]
        document, start, lengths = windows.columns(numbers)
        piece_bytes = PIECE_BYTES if in_any_order(documents) else windows.targets
        pieces = (windows.targets_before(numbers) - start) // piece_bytes
        _, bounds, number = np.unique(pieces, return_index=True, return_inverse=True)
        self._rows = np.split(order, bounds[1:])
        self._unread = np.ones(len(bounds), dtype=bool)
        sizes = np.minimum(lengths, windows.sizes[document] - start)
        columns = np.empty((4, len(order)), dtype=np.int64)
        columns[:, order] = np.cumsum(lengths) - lengths, lengths, sizes, number
        self._begins, self._lengths, self._sizes, self._piece = columns
        size = int(lengths.sum())
        self._text = room.of(size)
        patched = getattr(documents, "patching", None) is not None
        self._opens = np.zeros(size, dtype=bool) if patched else None

    def batch(self, first: int, end: int, scheme: IdScheme) -> Batch:
        """The tensors of the windows [first, end) of the pool."""
        for piece in np.unique(self._piece[first:end]).tolist():
            if self._unread[piece]:
                self._read(self._rows[piece])
                self._unread[piece] = False
        begins = self._begins[first:end].tolist()
        sizes = self._sizes[first:end].tolist()
        lengths = self._lengths[first:end].tolist()
        texts = [self._text[at : at + n] for at, n in zip(begins, sizes, strict=True)]
        opens = None
        if self._opens is not None:
            opens = [self._opens[at : at + n] for at, n in zip(begins, lengths, strict=True)]
        return stack(texts, lengths, scheme, opens)

    def _read(self, rows: Ints) -> None:
        """Read some windows, in the order of the corpus."""
        document, start, _ = self._windows.columns(self._pool.windows[rows])
        texts = texts_of(self._documents, np.unique(document))
        where = (self._begins[rows], self._lengths[rows], self._sizes[rows])
        columns = (each.tolist() for each in (document, start, *where))
        latest, text, opens = -1, b"", None
        for number, begin, at, length, size in zip(*columns, strict=True):
            if number != latest:
                latest, text = number, next(texts)
                if self._opens is not None:
                    opens = self._documents.opens(number)  # type: ignore[attr-defined]
            data = text[begin : begin + size]
            if len(data) != size:
                raise DataError(
                    f"{self._documents.source(number)}: is shorter than when it was found; it was "
                    "changed while it was in use\n  fix: run the command again"
                )
            self._text[at : at + size] = np.frombuffer(data, dtype=np.uint8)
            if self._opens is not None and opens is not None:
                self._opens[at : at + length] = opens[begin : begin + length]
