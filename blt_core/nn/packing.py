"""Rows picked out of batches: some of them by place, or all but the padding.

Axes: b batch rows, r rows, p valid rows of all batch rows, one after another.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import attrs
import torch
from torch import Tensor

#: Packing copies rows twice a layer, so it has to leave out this share of them.
_LEAST_PADDING = 0.1


@attrs.frozen(eq=False)
class Packing:
    """Where the valid rows of (b, r, …) lie: ``places_p`` counts through all batch rows."""

    batch: int
    width: int
    places_p: Tensor

    @classmethod
    def of(cls, counts: Sequence[int], width: int, places: Callable[[], Tensor]) -> Packing | None:
        """The packing of ``counts[b]`` valid rows each; None if there is too little padding.

        places: gives where they lie, if there is padding; asked for only then.
        """
        if sum(counts) > (1 - _LEAST_PADDING) * len(counts) * width:
            return None
        return cls(len(counts), width, places())

    def pack(self, x_br: Tensor) -> Tensor:
        """(b, r, …) to (1, p, …)."""
        return x_br.flatten(0, 1).index_select(0, self.places_p)[None]

    def unpack(self, x_1p: Tensor) -> Tensor:
        """(1, p, …) to (b, r, …), with zeros on padding."""
        empty = x_1p.new_zeros(self.batch * self.width, *x_1p.shape[2:])
        padded: Tensor = empty.index_copy(0, self.places_p, x_1p[0])
        return padded.view(self.batch, self.width, *x_1p.shape[2:])


@attrs.frozen(eq=False)
class Subset:
    """Some of ``batch`` batch rows: those at ``rows_a``."""

    batch: int
    rows_a: Tensor

    @classmethod
    def of(
        cls, active: Sequence[bool] | None, device: torch.device, rows_a: Tensor | None = None
    ) -> Subset | None:
        """Those that take part; None if too few do not to be worth copies.

        rows_a: their numbers, if the device knows them already.
        """
        if active is None or sum(active) > (1 - _LEAST_PADDING) * len(active):
            return None
        if rows_a is None:
            rows = [row for row, on in enumerate(active) if on]
            rows_a = torch.tensor(rows, dtype=torch.long, device=device)
        return cls(len(active), rows_a)

    def take(self, x_b: Tensor) -> Tensor:
        """(b, …) to (a, …)."""
        return x_b.index_select(0, self.rows_a)

    def take_heads(self, x_bt: Tensor) -> Tensor:
        """(b, t, g, d) to (a, t, g, d), the rows of a head side by side."""
        return self.take(x_bt.transpose(1, 2)).transpose(1, 2)

    def unpack(self, x_a: Tensor) -> Tensor:
        """(a, …) to (b, …), with zeros for the others."""
        empty = x_a.new_zeros(self.batch, *x_a.shape[1:])
        whole: Tensor = empty.index_copy(0, self.rows_a, x_a)
        return whole


def take_rows(x_br: Tensor, at: Tensor) -> Tensor:
    """Rows of (b, r, …) at the places (b, *n) of their own batch row: (b, *n, …)."""
    # Unlike gathering and indexing in two axes, index_select has a fast gradient.
    rows = x_br.flatten(0, 1).index_select(0, row_places(at, x_br.shape[1]).flatten())
    return rows.view(*at.shape, *x_br.shape[2:])


def row_places(at: Tensor, width: int) -> Tensor:
    """Places (b, *n) of batch rows of ``width``, counted through all of them."""
    if len(at) == 1:
        return at
    first = torch.arange(len(at), device=at.device) * width
    return first.view(-1, *[1] * (at.dim() - 1)) + at
