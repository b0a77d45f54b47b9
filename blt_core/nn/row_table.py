"""Tables of which a pass reads few rows: what spreads weights need not gather them."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn


class RowTable(nn.Embedding):
    """Rows that are looked up by number and summed, as those of hash n-grams are.

    Such a table may hold most of a model's parameters, and a pass reads a few thousand rows of it.
    So whoever spreads weights over processes may keep the rows where they are, and set ``spread``:
    what then finds the sum, with all processes, in place of the table's own weight.
    """

    spread: Callable[[Tensor], Tensor] | None = None

    def forward(self, numbers: Tensor) -> Tensor:
        """Numbers of rows, (…, n), to the sums of n rows each, (…, D)."""
        if self.spread is not None:
            return self.spread(numbers)
        found: Tensor = super().forward(numbers)
        return found.sum(-2)
