"""Windows of documents, and the tensors of a batch of them.

A document's *targets* are its bytes and EOS. Windows cut the targets into runs of at most
``context_bytes``; the rows of a window are BOS and all its targets but the last, so that every
target is predicted exactly once and no window spans two documents.

Axes: b batch rows, r byte rows.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Iterator, Sequence
from typing import overload

import attrs
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from blt_core.protocols import UNSCORED, Documents
from blt_core.types import IdScheme, Rows

Ints = npt.NDArray[np.int64]


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
    opens_br: whether each target opens a patch, as the patcher's flags say it; None if that is not
    known from the corpus.
    """

    rows: Rows
    targets_br: Tensor
    sizes: tuple[int, ...]
    opens_br: Tensor | None = None

    @property
    def scored(self) -> int:
        """Targets in this batch."""
        return sum(self.rows.lengths)

    def after(self, marker: Sequence[int]) -> Batch:
        """The same batch, of whose rows only what follows the first ``marker`` is scored.

        A row without it, or that ends with it, is scored whole.
        """
        targets_br, width = self.targets_br, self.targets_br.shape[1]
        if width <= len(marker):
            return self
        sought = torch.tensor(marker, device=targets_br.device)
        found_br = (targets_br.unfold(1, len(marker), 1) == sought).all(-1)
        first_b = torch.where(found_br.any(1), found_br.int().argmax(1) + len(marker), 0)
        kept_br = torch.arange(width, device=targets_br.device) >= first_b[:, None]
        left_b = (kept_br & (targets_br != UNSCORED)).any(1)
        return attrs.evolve(
            self, targets_br=targets_br.masked_fill(~kept_br & left_b[:, None], UNSCORED)
        )

    def to(self, device: torch.device) -> Batch:
        """The same batch on another device."""
        rows = attrs.evolve(self.rows, ids_br=self.rows.ids_br.to(device))
        opens = self.opens_br.to(device) if self.opens_br is not None else None
        targets = self.targets_br.to(device)
        return attrs.evolve(self, rows=rows, targets_br=targets, opens_br=opens)


class Texts:
    """Documents that are held in memory."""

    def __init__(self, texts: Sequence[bytes]) -> None:
        self._texts = texts
        self.sizes = np.array([len(text) for text in texts], dtype=np.int64)

    @property
    def digest(self) -> str:
        """A name for the texts and their order."""
        total = hashlib.sha256()
        for text in self._texts:
            total.update(hashlib.sha256(text).digest())
        return total.hexdigest()

    def __len__(self) -> int:
        return len(self._texts)

    def __getitem__(self, index: int) -> bytes:
        return self._texts[index]

    def source(self, index: int) -> str:
        """Its number."""
        return str(index)


class Windows(Sequence[Window]):
    """All windows of some documents, in order, made when asked for: 24 bytes a document.

    sizes: int64 (documents,), in bytes. targets: how many there are in all.
    """

    def __init__(self, sizes: Ints, context_bytes: int) -> None:
        self.sizes, self.context_bytes = np.asarray(sizes, dtype=np.int64), context_bytes
        # n bytes and EOS are n + 1 targets, in ceil((n + 1) / context) windows.
        self._window_ends = np.cumsum(self.sizes // context_bytes + 1)
        self._target_ends = np.cumsum(self.sizes + 1)
        self.targets = int(self._target_ends[-1]) if len(self.sizes) else 0

    def __len__(self) -> int:
        return int(self._window_ends[-1]) if len(self.sizes) else 0

    @overload
    def __getitem__(self, index: int) -> Window: ...
    @overload
    def __getitem__(self, index: slice) -> list[Window]: ...
    def __getitem__(self, index: int | slice) -> Window | list[Window]:
        """Window number ``index``."""
        if isinstance(index, slice):
            return [self[each] for each in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"window {index} of {len(self)}")
        columns = self.columns(np.array([index % len(self)]))
        return Window(*(int(column[0]) for column in columns))

    def __iter__(self) -> Iterator[Window]:
        for document, size in enumerate(self.sizes.tolist()):
            for start in range(0, size + 1, self.context_bytes):
                yield Window(document, start, min(self.context_bytes, size + 1 - start))

    def columns(self, numbers: Ints) -> tuple[Ints, Ints, Ints]:
        """(document, start, length) of some windows, each as an array."""
        document = np.searchsorted(self._window_ends, numbers, side="right")
        start = (numbers - self._first_window(document)) * self.context_bytes
        return document, start, np.minimum(self.context_bytes, self.sizes[document] + 1 - start)

    def targets_before(self, numbers: Ints) -> Ints:
        """The targets of all documents that come before some windows; a number may be the end."""
        document = np.searchsorted(self._window_ends, numbers, side="right")
        inside = document < len(self.sizes)
        known = document[inside]
        start = (numbers[inside] - self._first_window(known)) * self.context_bytes
        found = np.full(len(numbers), self.targets)
        found[inside] = self._target_ends[known] - self.sizes[known] - 1 + start
        return found

    def from_target(self, targets: Ints) -> Ints:
        """The first window that begins at or after each of some targets, counted over all."""
        document = np.searchsorted(self._target_ends, targets, side="right")
        inside = document < len(self.sizes)
        known = document[inside]
        offset = targets[inside] - (self._target_ends[known] - self.sizes[known] - 1)
        found = np.full(len(targets), len(self))
        found[inside] = self._first_window(known) + -(-offset // self.context_bytes)
        return found

    def _first_window(self, document: Ints) -> Ints:
        return self._window_ends[document] - self.sizes[document] // self.context_bytes - 1


def cut_windows(documents: Documents, context_bytes: int) -> Windows:
    """All windows of all documents, in order."""
    return Windows(documents.sizes, context_bytes)


def make_batch(documents: Documents, windows: Sequence[Window], scheme: IdScheme) -> Batch:
    """The tensors of some windows, read from their documents; patches where these know them."""
    knows_patches = getattr(documents, "patching", None) is not None
    texts, opens = [], []
    for window in windows:
        start, end = window.start, window.start + window.length
        data = documents[window.document][start:end]
        texts.append(np.frombuffer(data, dtype=np.uint8))
        if knows_patches:
            opens.append(documents.opens(window.document)[start:end])  # type: ignore[attr-defined]
    lengths = [window.length for window in windows]
    return stack(texts, lengths, scheme, opens if knows_patches else None)


def stack(
    texts: Sequence[npt.NDArray[np.uint8]],
    lengths: Sequence[int],
    scheme: IdScheme,
    opens: Sequence[npt.NDArray[np.bool_]] | None,
) -> Batch:
    """The tensors of windows of ``lengths`` targets; padding repeats BOS and is not scored.

    texts: the targets that are bytes; a window with one more target ends its document.
    """
    width = max(lengths)
    ids = torch.full((len(texts), width), scheme.bos)
    targets = torch.full((len(texts), width), UNSCORED)
    opens_br = torch.zeros(len(texts), width, dtype=torch.bool) if opens is not None else None
    for row, (text, length) in enumerate(zip(texts, lengths, strict=True)):
        values = torch.from_numpy(text.astype(np.int64)) + scheme.byte_offset
        ids[row, 1:length] = values[: length - 1]
        targets[row, : len(text)] = values
        if len(text) < length:
            targets[row, length - 1] = scheme.eos
        if opens is not None and opens_br is not None:
            opens_br[row, :length] = torch.from_numpy(opens[row].copy())
    return Batch(Rows(ids, tuple(lengths)), targets, tuple(map(len, texts)), opens_br)


def pack(windows: Sequence[Window], batch_bytes: int) -> Iterator[list[Window]]:
    """Groups of windows of similar length, each at most ``batch_bytes`` with its padding.

    A single window may be longer than that.
    """
    ordered = sorted(windows, key=lambda w: -w.length)
    for first, end in group_bounds([window.length for window in ordered], batch_bytes):
        yield ordered[first:end]


def group_bounds(lengths: Sequence[int], batch_bytes: int) -> Iterator[tuple[int, int]]:
    """The groups of windows that are sorted by their length, longest first."""
    first = 0
    while first < len(lengths):
        end = first + max(batch_bytes // lengths[first], 1)
        yield first, min(end, len(lengths))
        first = end


def sample(windows: Windows, size: int, seed: int) -> list[Window]:
    """Whole windows drawn without replacement until they hold ``size`` targets, or all."""
    rng, total = random.Random(f"{seed}/sample"), len(windows)
    count = min(total, math.ceil(2 * size / max(windows.targets, 1) * total) + 1)
    while count:
        numbers = np.array(rng.sample(range(total), count))
        ends = windows.columns(numbers)[2].cumsum()
        if ends[-1] >= size or count == total:
            needed = int(np.searchsorted(ends, size)) + 1
            return [windows[int(number)] for number in numbers[:needed]]
        count = min(2 * count, total)
    return []
