"""A drafter that looks the end of the text up in a tree of all that stood before."""

from __future__ import annotations

from collections.abc import Sequence

import attrs

from blt_core import BuildContext, Component, DecodeOps, Draft, Sampling, at_least
from blt_core.types import Draws


@attrs.frozen(kw_only=True)
class TreeParams:
    """draft_bytes: how many are proposed at most. depth: bytes of the end that are looked up."""

    draft_bytes: int = attrs.field(default=8, validator=at_least(1))
    depth: int = attrs.field(default=6, validator=at_least(1))


class Trees:
    """For each text, where each run of up to ``depth`` ids ended last; rewound with the text."""

    def __init__(self, batch: int, depth: int) -> None:
        self.depth = depth
        self.counts = [0] * batch
        #: Positions after each run, the last one last: a rewind takes off what it goes back past.
        self.ends: list[dict[tuple[int, ...], list[int]]] = [{} for _ in range(batch)]
        self.seen: list[list[int]] = [[] for _ in range(batch)]

    @property
    def lengths(self) -> list[int]:
        """Ids read."""
        return list(self.counts)

    def rewind(self, lengths: Sequence[int]) -> None:
        """Forget the runs that end later."""
        for row, length in enumerate(lengths):
            while self.counts[row] > length:
                for run in self._runs(row, self.counts[row]):
                    places = self.ends[row][run]
                    places.pop()
                    if not places:
                        del self.ends[row][run]
                self.seen[row].pop()
                self.counts[row] -= 1

    def settle(self, lengths: Sequence[int]) -> None:
        """Settled text stays worth looking up."""

    def read(self, row: int, ids: Sequence[int]) -> None:
        """Note the runs that end with each of the ids, which follow those read so far."""
        for token in ids:
            self.seen[row].append(token)
            self.counts[row] += 1
            for run in self._runs(row, self.counts[row]):
                self.ends[row].setdefault(run, []).append(self.counts[row])

    def after(self, row: int) -> list[int]:
        """What followed the longest end of the text that stood before; the last time it did."""
        for run in self._runs(row, self.counts[row]):
            places = self.ends[row][run]
            if len(places) > 1:
                return self.seen[row][places[-2] :]
        return []

    def _runs(self, row: int, end: int) -> list[tuple[int, ...]]:
        """The runs that end there, BOS aside, the longest first."""
        begin = max(end - self.depth, 1)
        return [tuple(self.seen[row][i:end]) for i in range(begin, end)]


class Tree:
    """Proposes what followed; nothing where the text is new."""

    def __init__(self, params: TreeParams, context: BuildContext) -> None:
        self.draft_bytes, self.depth = params.draft_bytes, params.depth

    def draft(
        self, ops: DecodeOps, limit: Sequence[int], sampling: Sampling, draws: Draws
    ) -> Draft:
        """Up to ``draft_bytes`` ids for each text."""
        trees = ops.attach(self, lambda batch: Trees(batch, self.depth))
        ids = []
        for row, most in enumerate(limit):
            trees.read(row, ops.text(row, trees.counts[row]))
            ids.append(trees.after(row)[: min(most, self.draft_bytes)])
        return Draft(ids)


TREE = Component("drafter", "acme/tree", Tree, TreeParams, "the longest end that stood before")
