"""A byte scorer: the next byte's logits from the mean of all bytes so far.

Change ``MeanScorer``, and ``Sums`` if you remember something else. Row i may depend on no byte
after byte i, and reading with a cache, in whatever pieces, must give what reading at once gives.

Try it:    blt plugins test byte_scorer acme/name
Contracts: docs/kinds/byte_scorer.md
"""

from __future__ import annotations

from collections.abc import Sequence

import attrs
import torch
from torch import Tensor, nn

from blt_core import BuildContext, Component, Rows, at_least, hookimpl

#: What configs call the component.
NAME = "acme/name"


@attrs.frozen(kw_only=True)
class MeanParams:
    """dim: width of the byte embeddings."""

    dim: int = attrs.field(default=32, validator=at_least(1))


class Sums:
    """The sums of all rows up to each one, for each text of a batch.

    Of all rows, so that a rewind finds them; a part keeps nothing on itself but its weights: one
    instance serves all texts.
    """

    def __init__(self, batch: int) -> None:
        self.sums: list[list[Tensor]] = [[] for _ in range(batch)]

    @property
    def lengths(self) -> list[int]:
        """Rows read, of each text."""
        return [len(row) for row in self.sums]

    def rewind(self, lengths: Sequence[int]) -> None:
        """Forget all rows after the given lengths."""
        for row, length in zip(self.sums, lengths, strict=True):
            del row[length:]

    def settle(self, lengths: Sequence[int]) -> None:
        """No rewind will go below these lengths; what only such a rewind needs may be dropped."""


def running_mean(x_bnD: Tensor, counts: Sequence[int], cache: Sums | None) -> Tensor:
    """(b, n, D): each row's mean with all before it. Row b has ``counts[b]`` new ones."""
    cache = cache if cache is not None else Sums(len(counts))
    out_bnD = torch.zeros_like(x_bnD)
    for b, count in enumerate(counts):
        before = cache.sums[b]
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

    def new_cache(self, batch: int) -> Sums:
        """An empty cache for so many texts."""
        return Sums(batch)

    def logits(self, rows: Rows, cache: Sums | None) -> Tensor:
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
