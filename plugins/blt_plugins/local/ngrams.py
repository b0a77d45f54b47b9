"""Hash n-gram embeddings: each byte also looks up the n-grams that end at it (BLT, section 3.2.1).

Axes: b batch rows, r new byte rows, D width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from blt_core.nn import RowCache, RowTable, Span

#: The base of the mixed hash, odd; high bits of a product with it are the well-mixed ones.
_MULTIPLIER = 0x9E3779B97F4A7C15 - (1 << 64)

#: The bases of the published hashes, in order.
PRIMES = (
    1000000007,
    5915587277,
    1500450271,
    3267000013,
    5754853343,
    4093082899,
    9576890767,
    3628273133,
    2860486313,
    5463458053,
    3367900313,
)

NgramHash = Literal["mixed", "published"]


class HashNgrams(nn.Module):
    """A table of ``rows`` embeddings for each hash function and size; the hash names a row.

    The hash of an n-gram is sum of symbol_j · base^j from its oldest byte on, in wrapping 64-bit
    arithmetic. hash "mixed": its high bits are taken; a symbol is an id + 1, and zero before the
    first byte. "published", that of the released BLT weights: the hash modulo ``rows``; symbols are
    ids, and id 0 stands before the first byte too. functions: how many hashes of each size, each
    with a prime and tables of its own (published only).
    """

    def __init__(
        self,
        sizes: Sequence[int],
        rows: int,
        dim: int,
        *,
        hash: NgramHash = "mixed",  # noqa: A002 -- the key's name
        functions: int = 1,
    ) -> None:
        super().__init__()
        self.sizes, self.rows, self.published = tuple(sizes), rows, hash == "published"
        self.bases = PRIMES[:functions] if self.published else (_MULTIPLIER,)
        self.table = RowTable(len(self.bases) * len(self.sizes) * rows, dim)

    def forward(self, ids_br: Tensor, span: Span, cache: RowCache | None) -> Tensor:
        """The sum of the n-gram embeddings at each new byte, (b, r, D)."""
        context = max(self.sizes) - 1
        symbols_br = ids_br if self.published else ids_br + 1
        symbols = self._with_past(symbols_br, context, span, cache)  # (b, context + r)
        places = []
        for function, base in enumerate(self.bases):
            first = function * len(self.sizes)
            for size, hashed in _hashes(symbols, self.sizes, base):
                row = hashed if self.published else (hashed * base) >> 20
                places.append(row % self.rows + (first + self.sizes.index(size)) * self.rows)
        summed: Tensor = self.table(torch.stack(places, dim=-1))
        return summed

    @staticmethod
    def _with_past(symbols_br: Tensor, context: int, span: Span, cache: RowCache | None) -> Tensor:
        if cache is None or span.from_start:
            if cache is not None:
                cache.write("symbols", span, symbols_br)
            return nn.functional.pad(symbols_br, (context, 0))
        cache.write("symbols", span, symbols_br)
        firsts, count = [start - context for start in span.starts], context + symbols_br.shape[1]
        first_b = None if span.start is not None else span.extents_2b[0] - context
        stored = cache.take("symbols", firsts, count, first_b)
        if min(firsts) >= 0:
            return stored
        places = torch.arange(count, device=stored.device)
        positions = places + (firsts[0] if first_b is None else first_b[:, None])
        return stored.masked_fill(positions < 0, 0)


def _hashes(symbols: Tensor, sizes: Sequence[int], base: int) -> Iterator[tuple[int, Tensor]]:
    """(size, hash (b, r)) of the n-grams that end at each row; more stand before."""
    context = max(sizes) - 1
    width = symbols.shape[1] - context
    hashed = torch.zeros_like(symbols[:, context:])
    for back in range(context + 1):
        hashed = hashed * base + symbols[:, context - back : context - back + width]
        if back + 1 in sizes:
            yield back + 1, hashed
