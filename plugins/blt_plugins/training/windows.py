"""Windows of documents, and the batches that they are trained in.

A document's *targets* are its bytes and EOS. Windows cut the targets into runs of at most
``context_bytes``; the rows of a window are BOS and all its targets but the last, so that every
target is predicted exactly once and no window spans two documents.

Axes: b batch rows, r byte rows.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence

import attrs
import torch
from torch import Tensor

from blt_core.protocols import UNSCORED
from blt_core.types import IdScheme, Rows

#: Windows are sorted by length within pools of this many, so that batches need little padding.
POOL = 256


@attrs.frozen
class Window:
    """Targets [start, start + length) of a document; the last document byte is followed by EOS."""

    document: int
    start: int
    length: int


@attrs.frozen(eq=False)
class Batch:
    """Rows, and what each predicts (b, r; UNSCORED on padding).

    sizes: targets of each row that are bytes; there is one more, EOS, where a document ends.
    """

    rows: Rows
    targets_br: Tensor
    sizes: tuple[int, ...]

    @property
    def scored(self) -> int:
        """Targets in this batch."""
        return sum(self.rows.lengths)

    def to(self, device: torch.device) -> Batch:
        """The same batch on another device."""
        rows = attrs.evolve(self.rows, ids_br=self.rows.ids_br.to(device))
        return attrs.evolve(self, rows=rows, targets_br=self.targets_br.to(device))


def cut_windows(documents: Sequence[bytes], context_bytes: int) -> list[Window]:
    """All windows of all documents, in order."""
    return [
        Window(index, start, min(context_bytes, len(text) + 1 - start))
        for index, text in enumerate(documents)
        for start in range(0, len(text) + 1, context_bytes)
    ]


def make_batch(documents: Sequence[bytes], windows: Sequence[Window], scheme: IdScheme) -> Batch:
    """The tensors of some windows; padding repeats BOS and is not scored."""
    width = max(window.length for window in windows)
    ids = torch.full((len(windows), width), scheme.bos)
    targets = torch.full((len(windows), width), UNSCORED)
    for row, window in enumerate(windows):
        end = window.start + window.length
        data = documents[window.document][window.start : end]
        values = torch.frombuffer(bytearray(data or b"\0"), dtype=torch.uint8).long()
        values = values[: len(data)] + scheme.byte_offset
        ids[row, 1 : window.length] = values[: window.length - 1]
        targets[row, : len(data)] = values
        if len(data) < window.length:
            targets[row, window.length - 1] = scheme.eos
    lengths = tuple(window.length for window in windows)
    sizes = tuple(min(w.length, len(documents[w.document]) - w.start) for w in windows)
    return Batch(Rows(ids, lengths), targets, sizes)


def pack(windows: Sequence[Window], batch_bytes: int) -> Iterator[list[Window]]:
    """Groups of windows of similar length, each at most ``batch_bytes`` with its padding.

    A single window may be longer than that.
    """
    group: list[Window] = []
    for window in sorted(windows, key=lambda w: -w.length):
        if group and (len(group) + 1) * group[0].length > batch_bytes:
            yield group
            group = []
        group.append(window)
    if group:
        yield group


class Batches:
    """The endless order of batches: a function of the seed and the batch's number alone."""

    def __init__(
        self,
        documents: Sequence[bytes],
        windows: Sequence[Window],
        *,
        scheme: IdScheme,
        batch_bytes: int,
        seed: str,
    ) -> None:
        self._documents, self._windows, self._scheme = documents, windows, scheme
        self._batch_bytes, self._seed = batch_bytes, seed
        self._first, self._epoch, self._groups = 0, 0, self._order(0)

    def __getitem__(self, number: int) -> Batch:
        """Batch ``number`` (from 0)."""
        return make_batch(self._documents, self._group(number), self._scheme)

    def size(self, number: int) -> int:
        """The scored targets of batch ``number``; no text is read."""
        return sum(window.length for window in self._group(number))

    def _group(self, number: int) -> list[Window]:
        if number < self._first:
            self._first, self._epoch, self._groups = 0, 0, self._order(0)
        while number >= self._first + len(self._groups):
            self._first += len(self._groups)
            self._epoch += 1
            self._groups = self._order(self._epoch)
        return self._groups[number - self._first]

    def _order(self, epoch: int) -> list[list[Window]]:
        """The groups of one pass over the data."""
        rng = random.Random(f"{self._seed}/{epoch}")
        windows = list(self._windows)
        rng.shuffle(windows)
        pools = (windows[i : i + POOL] for i in range(0, len(windows), POOL))
        groups = [group for pool in pools for group in pack(pool, self._batch_bytes)]
        rng.shuffle(groups)
        return groups


def sample(windows: Sequence[Window], size: int, seed: int) -> list[Window]:
    """Whole windows drawn without replacement until they hold ``size`` targets, or all."""
    shuffled = list(windows)
    random.Random(f"{seed}/sample").shuffle(shuffled)
    ends = itertools.accumulate(window.length for window in shuffled)
    return [w for w, end in zip(shuffled, ends, strict=True) if end - w.length < size]
