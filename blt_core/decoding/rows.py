"""Bookkeeping of one batch row of a decode state."""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter, defaultdict

import attrs

from blt_core.types import Passes, Shape, Shapes


class Tally:
    """Passes as they are counted, and the shapes of each part's."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self._widths: defaultdict[str, Counter[int]] = defaultdict(Counter)
        self._contexts: Counter[str] = Counter()

    @property
    def passes(self) -> Passes:
        """What was counted so far."""
        shapes = {
            part: Shape(tuple(sorted(widths.items())), self._contexts[part])
            for part, widths in self._widths.items()
        }
        return Passes(**self._counts, shapes=Shapes(**shapes))

    def count(self, field: str, part: str, rows: int, context: int) -> None:
        """Count a pass in a field of :class:`Passes`, and its shape for a part."""
        self._counts[field] += 1
        self._widths[part][rows] += 1
        self._contexts[part] += context

    def add(self, passes: Passes) -> None:
        """Count ``passes`` too."""
        counts = attrs.asdict(passes, recurse=False)
        shapes = attrs.asdict(counts.pop("shapes"), recurse=False)
        self._counts.update(counts)
        for part, shape in shapes.items():
            if shape.widths:
                self._widths[part].update(dict(shape.widths))
                self._contexts[part] += shape.context

    def copy(self) -> Tally:
        """One that goes on by itself from the same counts."""
        copied = Tally()
        copied.add(self.passes)
        return copied


@attrs.define
class RowState:
    """One text of n ids, and how far each part of the model has come on it.

    starts: positions whose flag is known and set, so byte j opens a patch iff j is among them.
    scored: ids that the scorer has read; flags 0..scored are known. encoded: byte rows that the
    encoder has run. decoded: decoder rows in the cache, of which the first ``true`` are true and
    the rest stale or provisional. A row is true if its flag was known and all rows before it were
    true. settled: no rewind goes below the patch that starts here. committed: ids that were
    there at the last ``commit``; dropped: the last of them, which rewinds have cut off since.
    prompt: ids of the prompt, BOS included, into which no rewind goes once it is read.
    """

    ids: list[int]
    starts: list[int] = attrs.field(factory=lambda: [0])
    scored: int = 0
    encoded: int = 0
    decoded: int = 0
    true: int = 0
    settled: int = 0
    committed: int = 0
    dropped: list[int] = attrs.field(factory=list)
    prompt: int = 0
    tally: Tally = attrs.field(factory=Tally)

    @property
    def latents(self) -> int:
        """How many patches are closed given the known flags; all their latents are computed."""
        return len(self.starts) - 1

    @property
    def open_start(self) -> int:
        """The first byte of the patch of the last id, as far as flags are known."""
        return self.start_before(len(self.ids) - 1)

    def start_before(self, position: int) -> int:
        """The first byte of the patch of an id, or of the last one, as far as flags are known."""
        return self.starts[bisect_right(self.starts, min(position, len(self.ids) - 1)) - 1]

    @property
    def kept(self) -> int:
        """How many ids no rewind cuts: up to the first of the settled patch, and a read prompt.

        The first byte of the settled patch stays, so that its patch is that of the last id.
        """
        read = self.scored or self.encoded or self.decoded
        return max(self.settled + 1, self.prompt if read else 0)

    def settle_prompt(self) -> None:
        """Settle the patch that the prompt ends in, once its flags are known."""
        if self.scored >= self.prompt - 1:
            self.settled = max(self.settled, self.start_before(self.prompt - 1))

    def copy(self) -> RowState:
        """A row of its own with the same text and the same progress."""
        return attrs.evolve(
            self,
            ids=list(self.ids),
            starts=list(self.starts),
            dropped=list(self.dropped),
            tally=self.tally.copy(),
        )

    def commit(self) -> None:
        """Note the ids that are there: nothing was dropped of them yet."""
        self.committed = len(self.ids)
        self.dropped.clear()

    @property
    def rewritten(self) -> bool:
        """Whether ids that were there at the last ``commit`` are others now, or gone."""
        first = self.committed - len(self.dropped)
        return self.ids[first : self.committed] != self.dropped if self.dropped else False

    def cut(self, length: int) -> None:
        """Keep ``length`` ids, flags 0..length, and what was computed from these."""
        intact = self.committed - len(self.dropped)
        if length < intact:
            self.dropped[:0] = self.ids[length:intact]
        del self.ids[length:]
        del self.starts[bisect_right(self.starts, length) :]
        self.prompt = min(self.prompt, length)
        self.scored = min(self.scored, length)
        self.encoded = min(self.encoded, length)
        self.decoded = min(self.decoded, length)
        self.true = min(self.true, length)


def latent_before(bounds: list[int], position: int) -> int:
    """The newest latent that is closed before byte ``position``, given where patches start.

    Row i reads ``latent_before(bounds, i + 1)``; a block reads that of its start, as the clean row
    before it does. 0 where there is none, for rows that take no part.
    """
    return max(bisect_right(bounds, position) - 2, 0)
