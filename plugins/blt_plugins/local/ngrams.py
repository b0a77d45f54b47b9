"""Hash n-gram embeddings: each byte also looks up the n-grams that end at it (BLT, section 3.2.1).

Axes: b batch rows, r new byte rows, D width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from blt_core.nn import RowCache, Span

#: An odd 64-bit multiplier; powers of it spread n-grams over a table in wrapping arithmetic.
_MULTIPLIER = 0x9E3779B97F4A7C15 - (1 << 64)


class HashNgrams(nn.Module):
    """One table of ``rows`` embeddings for each n-gram size; an n-gram's hash names its row.

    Before the first byte an n-gram is filled with zeros, which no id + 1 can be.
    """

    def __init__(self, sizes: Sequence[int], rows: int, dim: int) -> None:
        super().__init__()
        self.sizes, self.rows = tuple(sizes), rows
        self.table = nn.Embedding(len(self.sizes) * rows, dim)

    def forward(self, ids_br: Tensor, span: Span, cache: RowCache | None) -> Tensor:
        """The sum of the n-gram embeddings at each new byte, (b, r, D)."""
        context = max(self.sizes) - 1
        symbols = self._with_past(ids_br + 1, context, span, cache)  # (b, context + r)
        width = ids_br.shape[1]
        hashed = torch.zeros_like(ids_br)
        rows = []
        for back in range(max(self.sizes)):
            hashed = hashed * _MULTIPLIER + symbols[:, context - back : context - back + width]
            if back + 1 in self.sizes:
                # High bits of a product are the well-mixed ones.
                index = ((hashed * _MULTIPLIER) >> 20) % self.rows
                rows.append(index + self.sizes.index(back + 1) * self.rows)
        return self.table(torch.stack(rows, dim=-1)).sum(-2)

    @staticmethod
    def _with_past(symbols_br: Tensor, context: int, span: Span, cache: RowCache | None) -> Tensor:
        if cache is None or span.from_start:
            if cache is not None:
                cache.write("symbols", span, symbols_br)
            return nn.functional.pad(symbols_br, (context, 0))
        cache.write("symbols", span, symbols_br)
        device = symbols_br.device
        first = torch.tensor(span.starts, device=device)[:, None] - context
        places = first + torch.arange(context + symbols_br.shape[1], device=device)
        stored = cache.read("symbols", 0, None)
        base = cache.positions(0, 1, device)
        at = (places - base).clamp(0, stored.shape[1] - 1)
        return stored.gather(1, at).masked_fill(places < 0, 0)
