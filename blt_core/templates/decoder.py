"""A decoder: the next byte from the mean of all bytes so far, each beside the latent that it reads.

Change ``MeanDecoder``, and its caches if you remember something else. New latents are appended
first; row i may depend on no byte after byte i and on the latent that it names; reading with a
cache, in whatever pieces, must give what reading at once gives. This one was not made for blocks:
one that is says ``denoises``, provides it, and answers to ``blocks``.

Try it:    blt plugins test decoder acme/name
Contracts: docs/kinds/decoder.md
"""

from __future__ import annotations

from collections.abc import Sequence

import attrs
import torch
from torch import Tensor, nn

from blt_core import (
    Blocks,
    BuildContext,
    Component,
    DecoderOutput,
    Latents,
    ListCache,
    Output,
    Rows,
    at_least,
    hookimpl,
)

#: What configs call the component.
NAME = "acme/name"


@attrs.frozen(kw_only=True)
class MeanParams:
    """latent_dim: width of the latents, the same in all parts. dim: of the bytes' embeddings."""

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


@attrs.frozen
class MeanCache:
    """What a decoder remembers grows apart: byte rows, and latents."""

    rows: ListCache[Tensor]
    latents: ListCache[Tensor]


class MeanDecoder(nn.Module):
    """Embeddings and latents, their running mean, and a hidden layer that sees both."""

    denoises = False
    reads_byte_states = False

    def __init__(self, params: MeanParams, context: BuildContext) -> None:
        super().__init__()
        self.embed = nn.Embedding(context.scheme.size, params.dim)
        self.latent = nn.Linear(params.latent_dim, params.dim)
        self.hidden = nn.Linear(2 * params.dim, params.dim)
        self.head = nn.Linear(params.dim, context.scheme.size)

    def new_cache(self, batch: int) -> MeanCache:
        """An empty cache for so many texts."""
        return MeanCache(ListCache(batch), ListCache(batch))

    def forward(
        self,
        clean: Rows | None,
        blocks: Blocks | None,  # never given to one that does not denoise
        latents: Latents | None,
        cache: MeanCache | None,
    ) -> DecoderOutput:
        """The logits of the clean rows (b, r, V), and their hidden states (b, r, D)."""
        texts = latents.counts if latents is not None else clean.lengths if clean else ()
        cache = cache if cache is not None else self.new_cache(len(texts))
        if latents is not None:
            for row, count in enumerate(latents.counts):
                cache.latents.rows[row].extend(latents.values_bmD[row, :count].unbind(0))
        if clean is None:
            return DecoderOutput(None, None)
        x_brD = self.embed(clean.ids_br) + self._latents(clean, cache.latents)
        mean_brD = running_mean(x_brD, clean.lengths, cache.rows)
        hidden_brD = self.hidden(torch.cat((x_brD, mean_brD), -1)).tanh()
        return DecoderOutput(Output(self.head(hidden_brD), hidden_brD), None)

    def _latents(self, clean: Rows, kept: ListCache[Tensor]) -> Tensor:
        """(b, r, D): the latent that each row reads, mapped; zeros for padding."""
        (b, r), weight = clean.ids_br.shape, self.latent.weight
        read_brD = weight.new_zeros(b, r, weight.shape[1])
        if clean.latent_br is not None:
            for row, count in enumerate(clean.lengths):
                for i, at in enumerate(clean.latent_br[row, :count].tolist()):
                    read_brD[row, i] = kept.rows[row][at]
        mapped: Tensor = self.latent(read_brD)
        return mapped


@hookimpl
def blt_components() -> list[Component]:
    """The decoder; ``dims`` names the size that the parts of a model must agree on."""
    dims = {"latent_dim": "latent_dim"}
    summary = "the next byte from the mean of all before it"
    return [Component("decoder", NAME, MeanDecoder, MeanParams, summary, dims)]
