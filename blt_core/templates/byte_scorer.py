"""A byte scorer: the next byte's logits from the mean of all bytes so far.

Change ``MeanScorer``, and what it remembers. Row i may depend on no byte
after byte i, and reading with a cache, in whatever pieces, must give what reading at once gives.

Try it:    blt plugins test byte_scorer acme/name
Contracts: docs/kinds/byte_scorer.md
"""

from __future__ import annotations

from collections.abc import Sequence

import attrs
import torch
from torch import Tensor, nn

from blt_core import BuildContext, Component, ListCache, Rows, at_least, hookimpl

#: What configs call the component.
NAME = "acme/name"


@attrs.frozen(kw_only=True)
class MeanParams:
    """dim: width of the byte embeddings."""

    dim: int = attrs.field(default=32, validator=at_least(1))


def running_mean(x_bnD: Tensor, counts: Sequence[int], cache: ListCache[Tensor] | None) -> Tensor:
    """(b, n, D): each row's mean with all before it. Row b has ``counts[b]`` new ones.

    cache: remembers the sums of all rows up to each one, so that a rewind finds them.
    """
    cache = cache if cache is not None else ListCache(len(counts))
    out_bnD = torch.zeros_like(x_bnD)
    for b, count in enumerate(counts):
        before = cache.rows[b]
        start_D = before[-1] if before else torch.zeros_like(x_bnD[b, :1].sum(0))
        sums_nD = start_D + x_bnD[b, :count].cumsum(0)
        at_n = torch.arange(len(before) + 1, len(before) + 1 + count, device=x_bnD.device)
        out_bnD[b, :count] = sums_nD / at_n[:, None]
        before.extend(sums_nD.unbind(0))
    return out_bnD


class MeanScorer(nn.Module):
    """Embeddings, their running mean, and a hidden layer that sees both."""

    def __init__(self, params: MeanParams, context: BuildContext) -> None:
        super().__init__()
        self.embed = nn.Embedding(context.scheme.size, params.dim)
        self.hidden = nn.Linear(2 * params.dim, params.dim)
        self.head = nn.Linear(params.dim, context.scheme.size)

    def new_cache(self, batch: int) -> ListCache[Tensor]:
        """An empty cache for so many texts."""
        return ListCache(batch)

    def logits(self, rows: Rows, cache: ListCache[Tensor] | None) -> Tensor:
        """(b, r, V): row i predicts byte i + 1."""
        x_brD = self.embed(rows.ids_br)
        mean_brD = running_mean(x_brD, rows.lengths, cache)
        hidden: Tensor = self.head(self.hidden(torch.cat((x_brD, mean_brD), -1)).tanh())
        return hidden


@hookimpl
def blt_components() -> list[Component]:
    """The scorer."""
    summary = "the next byte from the mean of all before it"
    return [Component("byte_scorer", NAME, MeanScorer, MeanParams, summary)]
