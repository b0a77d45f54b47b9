"""The byte model behind the entropy patcher: a small windowed transformer.

Axes: b batch rows, r new byte rows, V ids, D width.
"""

from __future__ import annotations

import attrs
from torch import Tensor, nn

from blt_core.component import BuildContext, Component, at_least, more_than, overridable
from blt_core.nn import (
    Linear,
    RMSNorm,
    RowCache,
    Transformer,
    check_heads,
    end_weights,
    initialise,
)
from blt_core.types import Rows


@attrs.frozen(kw_only=True)
class TransformerScorerParams:
    """Sizes of the scorer.

    dim: width of its rows. layers: how many. heads: attention heads a layer. hidden: width of each
    feed-forward net.
    rope_theta: base of the rotary positions.

    window: how many bytes a row sees, itself included (None: all).
    """

    dim: int = attrs.field(default=128, validator=at_least(2))
    layers: int = attrs.field(default=2, validator=at_least(1))
    heads: int = attrs.field(default=4, validator=at_least(1))
    hidden: int = attrs.field(default=352, validator=at_least(1))
    window: int | None = overridable(default=None, validator=at_least(1))
    rope_theta: float = attrs.field(default=10000.0, validator=more_than(0))

    def __attrs_post_init__(self) -> None:
        check_heads(self.dim, self.heads, self.heads)


class TransformerScorer(nn.Module):
    """Byte embeddings, a causal stack, a norm and a head."""

    def __init__(self, params: TransformerScorerParams, context: BuildContext) -> None:
        super().__init__()
        self.embed = nn.Embedding(context.scheme.size, params.dim)
        self.stack = Transformer(
            dim=params.dim,
            layers=params.layers,
            heads=params.heads,
            hidden=params.hidden,
            window=params.window,
            rope_theta=params.rope_theta,
        )
        self.norm = RMSNorm(params.dim)
        self.head = Linear(params.dim, context.scheme.size)
        initialise(self, params.layers)

    def new_cache(self, batch: int) -> RowCache:
        """Keys and values of the bytes read."""
        return self.stack.new_cache(batch, ends=end_weights(self.embed, self.norm, self.head))

    def logits(self, rows: Rows, cache: RowCache | None) -> Tensor:
        """(b, r, V): row i predicts byte i + 1."""
        ends = self.embed, self.norm, self.head
        known = rows.extents_2b, rows.settled
        return self.stack.predict(rows.ids_br, rows.lengths, cache, ends, *known)


TRANSFORMER_SCORER = Component(
    kind="byte_scorer",
    name="transformer",
    factory=TransformerScorer,
    params=TransformerScorerParams,
    summary="a small windowed byte transformer",
)
