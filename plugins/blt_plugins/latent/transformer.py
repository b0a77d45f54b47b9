"""The global model: a causal transformer over patches (BLT, section 3.1).

Axes: b batch rows, m new patches, D width.
"""

from __future__ import annotations

import attrs
from torch import Tensor, nn

from blt_core.component import BuildContext, Component, at_least, more_than, overridable
from blt_core.nn import RowCache, Transformer, check_heads, initialise
from blt_core.types import Latents


@attrs.frozen(kw_only=True)
class GlobalTransformerParams:
    """Sizes of the global model.

    latent_dim: width of its rows. layers: how many. heads: attention heads a layer.
    hidden: width of each feed-forward net. rope_theta: base of the rotary positions.

    kv_heads: key/value heads (grouped-query attention; None: as many as heads).

    window: how many patches a row sees, itself included (None: all).
    """

    latent_dim: int = attrs.field(validator=at_least(2))
    layers: int = attrs.field(validator=at_least(1))
    heads: int = attrs.field(validator=at_least(1))
    kv_heads: int | None = attrs.field(default=None, validator=at_least(1))
    hidden: int = attrs.field(validator=at_least(1))
    window: int | None = overridable(default=None, validator=at_least(1))
    rope_theta: float = attrs.field(default=500_000.0, validator=more_than(0))

    def __attrs_post_init__(self) -> None:
        check_heads(self.latent_dim, self.heads, self.kv_heads or self.heads)


class GlobalTransformer(nn.Module):
    """A plain stack; rotary positions are patch indices, and there is no final norm."""

    def __init__(self, params: GlobalTransformerParams, context: BuildContext) -> None:
        super().__init__()
        self.stack = Transformer(
            dim=params.latent_dim,
            layers=params.layers,
            heads=params.heads,
            kv_heads=params.kv_heads,
            hidden=params.hidden,
            window=params.window,
            rope_theta=params.rope_theta,
        )
        initialise(self, params.layers)

    def new_cache(self, batch: int) -> RowCache:
        """Keys and values of the closed patches."""
        return self.stack.new_cache(batch)

    def forward(self, embeddings: Latents, cache: RowCache | None) -> Tensor:
        """Latents (b, m, D) of new patches."""
        known = embeddings.extents_2b, embeddings.settled
        return self.stack(embeddings.values_bmD, embeddings.counts, cache, *known)


GLOBAL_TRANSFORMER = Component(
    kind="global_model",
    name="transformer",
    factory=GlobalTransformer,
    params=GlobalTransformerParams,
    summary="a causal transformer over patches with grouped-query attention",
    dims={"latent_dim": "latent_dim"},
)
