"""Dealing held-out text out to the processes of a run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Generic, TypeVar

import attrs

T = TypeVar("T")
R = TypeVar("R")


@attrs.frozen(eq=False)
class Share(Generic[T]):
    """What one process scores, a batch at a time.

    batches: its own; there may be none. rounds: the batches of the process that has the most, the
    same number in every process, and 0 if there is nothing to score at all.
    """

    batches: Sequence[T]
    rounds: int

    @classmethod
    def whole(cls, batches: Iterable[T]) -> Share[T]:
        """All of some batches, as a single process has them."""
        kept = list(batches)
        return cls(kept, len(kept))

    def map(self, change: Callable[[T], R]) -> Share[R]:
        """The same share with every batch changed."""
        return Share([change(batch) for batch in self.batches], self.rounds)

    def __iter__(self) -> Iterator[T]:
        return iter(self.batches)


def deal(items: Sequence[T], sizes: Sequence[int], processes: int) -> list[list[T]]:
    """Whole items for each process, whose sizes add up to about as much.

    The largest item goes to the smallest share, the next one likewise; so shares differ by no more
    than the largest item. Items of a share keep their order. The result depends on the arguments
    alone, so that every process finds the same.
    """
    shares: list[list[int]] = [[] for _ in range(processes)]
    totals = [0] * processes
    for item in sorted(range(len(items)), key=lambda number: -sizes[number]):
        least = min(range(processes), key=totals.__getitem__)
        shares[least].append(item)
        totals[least] += sizes[item]
    return [[items[number] for number in sorted(share)] for share in shares]
