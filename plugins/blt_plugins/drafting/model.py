"""A draft model: a model from another checkpoint writes, and the one that is decoded verifies."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import attrs
from torch import Tensor

from blt_core.component import BuildContext, Component, at_least, not_empty
from blt_core.decoding.following import FollowingState
from blt_core.errors import RunError
from blt_core.model import Model
from blt_core.protocols import DecodeOps
from blt_core.types import Draft, Draws, Sampling, StopRule
from blt_plugins.drafting.writing import write


@attrs.frozen(kw_only=True)
class ModelParams:
    """checkpoint: a folder, or demo:NAME, as in [run]. draft_bytes: bytes drafted a round (k)."""

    checkpoint: str = attrs.field(validator=not_empty())
    draft_bytes: int = attrs.field(default=8, validator=at_least(1))


class ModelDrafter:
    """Writes k bytes with full passes of another model, which reads the same text with own caches.

    Its passes count as ``draft``, priced by its own size. It proposes nothing beyond its own
    context. Raises ValueError for a model of another id scheme.
    """

    def __init__(self, params: ModelParams, context: BuildContext) -> None:
        self.draft_bytes = params.draft_bytes
        self.model: Model = context.load_model(params.checkpoint)
        self._checkpoint = params.checkpoint
        own, wanted = attrs.asdict(self.model.scheme), attrs.asdict(context.scheme)
        if own != wanted:
            other = [f"{k} = {own[k]} instead of {wanted[k]}" for k in own if own[k] != wanted[k]]
            raise ValueError(
                f"checkpoint: {params.checkpoint} has other ids than the model "
                f"({', '.join(other)}); name one that was trained with the same ids"
            )

    def draft(
        self,
        ops: DecodeOps,
        limit: Sequence[int],
        sampling: Sampling,
        draws: Draws,
        rule: StopRule | None = None,
    ) -> Draft:
        """At most ``draft_bytes`` ids of each row, and what they were drawn from."""
        other = ops.attach(self, partial(FollowingState, self.model))
        # The text counts BOS, which is none of the context's bytes.
        room = [self.model.context_bytes + 1 - length for length in ops.lengths]
        most = [max(min(self.draft_bytes, n, k), 0) for n, k in zip(limit, room, strict=True)]

        def logits_of(rows: Sequence[int]) -> Tensor:
            try:
                return other.next_logits(ops, rows)
            except RunError as error:
                raise RunError(f"draft model {self._checkpoint}: {error}") from error

        return write(ops, most, logits_of, sampling, draws, rule)


MODEL = Component(
    kind="drafter",
    name="model",
    factory=ModelDrafter,
    params=ModelParams,
    summary="a model from another checkpoint",
    provides=lambda _: frozenset({"stops_early", "gives_q"}),
)
