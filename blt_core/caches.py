"""A cache for parts that remember one thing for each row, whatever it is.

Those of blt-core remember keys and values in :class:`blt_core.nn.RowCache`, which a part of torch
layers may use too; this one is plain lists.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Generic, TypeVar

T = TypeVar("T")


class ListCache(Generic[T]):
    """A :class:`~blt_core.protocols.ReorderingCache` of lists, one for each text of a batch.

    rows: ``rows[b]`` has a thing for each row of text b that was read, such as a state after it or
    the id itself; whoever reads adds to it. Nothing is dropped before it is rewound.
    """

    def __init__(self, batch: int) -> None:
        self.rows: list[list[T]] = [[] for _ in range(batch)]

    @property
    def lengths(self) -> list[int]:
        """Rows that were read, of each text."""
        return [len(row) for row in self.rows]

    def rewind(self, lengths: Sequence[int]) -> None:
        """Forget all rows after the given lengths."""
        for row, length in zip(self.rows, lengths, strict=True):
            del row[length:]

    def settle(self, lengths: Sequence[int]) -> None:
        """No rewind goes below these lengths; all is kept nevertheless."""

    def reorder(self, rows: Sequence[int]) -> None:
        """Text b becomes a copy of what text ``rows[b]`` was."""
        self.rows = [list(self.rows[row]) for row in rows]
