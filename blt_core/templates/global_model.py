"""A global model: latents from the mean of all patches so far.

Change ``MeanModel``, and what it remembers. A latent may depend on no later
patch, and reading with a cache, in whatever pieces, must give what reading at once gives.

Try it:    blt plugins test global_model acme/name
Contracts: docs/kinds/global_model.md
"""

from __future__ import annotations

from collections.abc import Sequence

import attrs
import torch
from torch import Tensor, nn

from blt_core import BuildContext, Component, Latents, ListCache, at_least, hookimpl

#: What configs call the component.
NAME = "acme/name"


@attrs.frozen(kw_only=True)
class MeanParams:
    """latent_dim: width of the latents, the same in all parts. hidden: of the layer within."""

    latent_dim: int = attrs.field(validator=at_least(1))
    hidden: int = attrs.field(default=64, validator=at_least(1))


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


class MeanModel(nn.Module):
    """Each patch and the mean of all so far, through a hidden layer, added to the patch."""

    def __init__(self, params: MeanParams, context: BuildContext) -> None:
        super().__init__()
        self.hidden = nn.Linear(2 * params.latent_dim, params.hidden)
        self.out = nn.Linear(params.hidden, params.latent_dim)

    def new_cache(self, batch: int) -> ListCache[Tensor]:
        """An empty cache for so many texts."""
        return ListCache(batch)

    def forward(self, embeddings: Latents, cache: ListCache[Tensor] | None) -> Tensor:
        """(b, m, D): a latent for each new patch."""
        x_bmD = embeddings.values_bmD
        mean_bmD = running_mean(x_bmD, embeddings.counts, cache)
        added: Tensor = self.out(self.hidden(torch.cat((x_bmD, mean_bmD), -1)).tanh())
        return x_bmD + added


@hookimpl
def blt_components() -> list[Component]:
    """The global model; ``dims`` names the size that the parts of a model must agree on."""
    dims = {"latent_dim": "latent_dim"}
    summary = "latents from the mean of all patches so far"
    return [Component("global_model", NAME, MeanModel, MeanParams, summary, dims)]
