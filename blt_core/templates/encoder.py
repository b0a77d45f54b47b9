"""An encoder: byte states from the mean of all bytes so far, a patch from the mean of its states.

Change ``MeanEncoder``, and what it remembers. A byte's state may depend on no
later byte, a patch's embedding on the states of its own bytes alone, and reading with a cache, in
whatever pieces, must give what reading at once gives.

Try it:    blt plugins test encoder acme/name
Contracts: docs/kinds/encoder.md
"""

from __future__ import annotations

from collections.abc import Sequence

import attrs
import torch
from torch import Tensor, nn

from blt_core import BuildContext, Component, ListCache, Patches, Rows, at_least, hookimpl

#: What configs call the component.
NAME = "acme/name"


@attrs.frozen(kw_only=True)
class MeanParams:
    """latent_dim: width of the patch embeddings, the same in all parts. dim: of the bytes'."""

    latent_dim: int = attrs.field(validator=at_least(1))
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


class MeanEncoder(nn.Module):
    """Embeddings beside their running mean; a patch is the mean of its bytes, mapped."""

    def __init__(self, params: MeanParams, context: BuildContext) -> None:
        super().__init__()
        self.embed = nn.Embedding(context.scheme.size, params.dim)
        self.out = nn.Linear(2 * params.dim, params.latent_dim)

    def new_cache(self, batch: int) -> ListCache[Tensor]:
        """An empty cache for so many texts."""
        return ListCache(batch)

    def byte_states(self, rows: Rows, cache: ListCache[Tensor] | None) -> Tensor:
        """(b, r, D): the state of each new byte."""
        x_brD = self.embed(rows.ids_br)
        return torch.cat((x_brD, running_mean(x_brD, rows.lengths, cache)), -1)

    def patch_embeddings(self, states_brD: Tensor, patches: Patches) -> Tensor:
        """(b, m, D): each patch from the states of its own bytes."""
        (b, m), width = patches.start_bm.shape, states_brD.shape[-1]
        mean_bmD = states_brD.new_zeros(b, m, width)
        for row, count in enumerate(patches.counts):
            firsts, sizes = patches.start_bm[row].tolist(), patches.size_bm[row].tolist()
            for j, (first, size) in enumerate(zip(firsts[:count], sizes[:count], strict=True)):
                mean_bmD[row, j] = states_brD[row, first : first + size].mean(0)
        embeddings: Tensor = self.out(mean_bmD)
        return embeddings


@hookimpl
def blt_components() -> list[Component]:
    """The encoder; ``dims`` names the size that the parts of a model must agree on."""
    dims = {"latent_dim": "latent_dim"}
    summary = "patches as means of their bytes"
    return [Component("encoder", NAME, MeanEncoder, MeanParams, summary, dims)]
