"""The local encoder: bytes to patch embeddings (BLT, section 3.2).

Axes: b batch rows, r byte rows, m patches, l bytes of a patch, k query slots, h heads, d width of
a head, D width of the encoder.
"""

from __future__ import annotations

import attrs
import torch
from torch import Tensor, nn

from blt_core.component import BuildContext, Component, at_least, between, more_than, overridable
from blt_core.nn import (
    Linear,
    RMSNorm,
    RowCache,
    Transformer,
    check_heads,
    initialise,
    new_span,
    take_rows,
)
from blt_core.types import Patches, Rows
from blt_plugins.local.ngrams import PRIMES, HashNgrams, NgramHash


@attrs.frozen(kw_only=True)
class LocalEncoderParams:
    """Sizes of the encoder.

    dim: width of its rows. layers: how many. heads: attention heads a layer.
    hidden: width of each feed-forward net. rope_theta: base of the rotary positions.

    slots: query vectors a patch (k). ngram_sizes, ngram_rows: hash n-gram tables (none if empty);
    ngram_hash, ngram_functions: how they are looked up. window: how many bytes a row sees, itself
    included (None: all). latent_dim: width of the global model; a projection is added where
    slots · dim differs from it. double_residual: patch queries add themselves twice to what they
    attend to, as in the released BLT weights.
    """

    dim: int = attrs.field(validator=at_least(2))
    layers: int = attrs.field(default=1, validator=at_least(1))
    heads: int = attrs.field(validator=at_least(1))
    hidden: int = attrs.field(validator=at_least(1))
    latent_dim: int = attrs.field(validator=at_least(2))
    slots: int = attrs.field(default=2, validator=at_least(1))
    window: int | None = overridable(default=None, validator=at_least(1))
    ngram_sizes: list[int] = attrs.field(factory=lambda: [3, 4, 5, 6, 7, 8])
    ngram_rows: int = attrs.field(default=500_002, validator=at_least(1))
    ngram_hash: NgramHash = "mixed"
    ngram_functions: int = attrs.field(default=1, validator=between(1, len(PRIMES)))
    double_residual: bool = False
    rope_theta: float = attrs.field(default=500_000.0, validator=more_than(0))

    def __attrs_post_init__(self) -> None:
        check_heads(self.dim, self.heads, self.heads)
        sizes = self.ngram_sizes
        if any(size < 1 for size in sizes) or len(set(sizes)) != len(sizes):
            raise ValueError(f"ngram_sizes: expected different sizes of at least 1, got {sizes}")
        if self.ngram_hash == "mixed" and self.ngram_functions > 1:
            raise ValueError("ngram_functions: only the published hash has more than one")


class LocalEncoder(nn.Module):
    """Byte and n-gram embeddings, causal layers, and one pooled, attending query group a patch."""

    def __init__(self, params: LocalEncoderParams, context: BuildContext) -> None:
        super().__init__()
        self.embed = nn.Embedding(context.scheme.size, params.dim)
        self.ngrams = (
            HashNgrams(
                params.ngram_sizes,
                params.ngram_rows,
                params.dim,
                hash=params.ngram_hash,
                functions=params.ngram_functions,
            )
            if params.ngram_sizes
            else None
        )
        self.stack = Transformer(
            dim=params.dim,
            layers=params.layers,
            heads=params.heads,
            hidden=params.hidden,
            window=params.window,
            rope_theta=params.rope_theta,
        )
        self.pooling = PatchAttention(
            params.dim, params.heads, params.slots, double_residual=params.double_residual
        )
        wide = params.slots * params.dim
        self.to_latent = Linear(wide, params.latent_dim) if wide != params.latent_dim else None
        initialise(self, params.layers)

    @property
    def table_parameters(self) -> int:
        """Parameters of the n-gram tables: looked up, not streamed."""
        return 0 if self.ngrams is None else self.ngrams.table.weight.numel()

    def new_cache(self, batch: int) -> RowCache:
        """Keys and values of the bytes read, and their ids for n-grams."""
        return self.stack.new_cache(batch, 0 if self.ngrams is None else max(self.ngrams.sizes))

    def byte_states(self, rows: Rows, cache: RowCache | None) -> Tensor:
        """(b, r, D): causal states of new bytes."""
        known = rows.extents_2b, rows.settled
        span = new_span(rows.ids_br, rows.lengths, cache, self.stack.window, *known)
        x = self.embed(rows.ids_br)
        if self.ngrams is not None:
            x = x + self.ngrams(rows.ids_br, span, cache)
        return self.stack.run(x, span, cache)

    def patch_embeddings(self, states_brD: Tensor, patches: Patches) -> Tensor:
        """(b, m, latent_dim): each patch from the states of its own bytes."""
        slots = self.pooling(states_brD, patches).flatten(-2)
        return slots if self.to_latent is None else self.to_latent(slots)


class PatchAttention(nn.Module):
    """k queries a patch, made from its max-pooled states, attend to the bytes of that patch."""

    def __init__(self, dim: int, heads: int, slots: int, *, double_residual: bool) -> None:
        super().__init__()
        check_heads(dim, heads, heads)
        self.heads, self.slots, self.double_residual = heads, slots, double_residual
        self.queries = Linear(dim, slots * dim)
        self.query_norm = RMSNorm(dim)
        self.state_norm = RMSNorm(dim)
        self.q = Linear(dim, dim)
        self.kv = Linear(dim, dim, dim)
        self.out = Linear(dim, dim)

    def forward(self, states_brD: Tensor, patches: Patches) -> Tensor:
        """(b, m, k, D)."""
        at_bml, inside_bml = patch_places(patches, states_brD.shape[1])
        pooled = take_rows(states_brD, at_bml).masked_fill(~inside_bml[..., None], float("-inf"))
        x = self.queries(pooled.amax(2)).unflatten(-1, (self.slots, -1))  # (b, m, k, D)
        q = self.q(self.query_norm(x)).unflatten(-1, (self.heads, -1))
        kv = take_rows(self.kv(self.state_norm(states_brD)), at_bml)
        k, v = kv.unflatten(-1, (2 * self.heads, -1)).chunk(2, dim=-2)  # (b, m, l, h, d)
        scores = torch.einsum("bmkhd,bmlhd->bmhkl", q * q.shape[-1] ** -0.5, k)
        weights = scores.masked_fill(~inside_bml[:, :, None, None], float("-inf")).softmax(-1)
        attended = torch.einsum("bmhkl,bmlhd->bmkhd", weights, v)
        return (x + x if self.double_residual else x) + self.out(attended.flatten(-2))


def patch_places(patches: Patches, rows: int) -> tuple[Tensor, Tensor]:
    """Row numbers of each patch's bytes (b, m, l), and which of the l places are in the patch.

    A padding patch of size 0 counts as its first row, so that nothing is pooled over nothing.
    """
    sizes = patches.size_bm.clamp(min=1)
    longest = int(sizes.max()) if patches.longest is None else max(patches.longest, 1)
    offsets = torch.arange(longest, device=sizes.device)
    inside = offsets < sizes[..., None]
    return (patches.start_bm[..., None] + offsets).clamp(max=rows - 1), inside


LOCAL_ENCODER = Component(
    kind="encoder",
    name="local",
    factory=LocalEncoder,
    params=LocalEncoderParams,
    summary="byte and hash n-gram embeddings, a windowed transformer, attending patch queries",
    dims={"latent_dim": "latent_dim"},
)
