"""A decode state of another model that follows a text: what a draft model drafts with.

Axes: b batch rows, V ids.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from blt_core.decoding.state import DecodeState
from blt_core.model import Model
from blt_core.protocols import DecodeOps
from blt_core.types import Parameters, Passes


class FollowingState:
    """A cache for :meth:`DecodeOps.attach` that reads the same texts with another model.

    The model must have the id scheme of the one that it follows. Texts may not become longer than
    its context.
    """

    def __init__(self, model: Model, batch: int) -> None:
        self._state = DecodeState(model, [[]] * batch, [0] * batch)
        self._parameters = model.parameter_counts()

    @property
    def lengths(self) -> Sequence[int]:
        """Ids read, per batch row; BOS stands in each from the beginning."""
        return self._state.lengths

    def rewind(self, lengths: Sequence[int]) -> None:
        """Cut to ``lengths[b]`` ids; BOS stays."""
        self._state.rewind([max(length, 1) for length in lengths])

    def settle(self, lengths: Sequence[int]) -> None:
        """Promise not to rewind below ``lengths[b]``."""
        self._state.settle(lengths)

    def next_logits(self, ops: DecodeOps, rows: Sequence[int]) -> Tensor:
        """True passes of the other model: (b, max(rows), V), counted on ``ops`` as a draft model's.

        As :meth:`DecodeOps.next_logits`, of the texts as they stand there.
        """
        state = self._state
        new = [
            ops.text(row, length) if on else []
            for row, (length, on) in enumerate(zip(state.lengths, rows, strict=True))
        ]
        state.append(new)
        counted, called = [state.passes(row) for row in range(len(new))], state.calls
        logits = state.next_logits(rows)
        charged = [self._price(before, state.passes(row)) for row, before in enumerate(counted)]
        ops.charge(charged, self._price(called, state.calls))
        return logits

    def _price(self, before: Passes, after: Passes) -> Passes:
        """What passes since ``before`` count for whom they drafted."""
        each: Parameters = self._parameters
        decoder, encoder = after.decoder - before.decoder, after.encoder - before.encoder
        states = max(encoder, after.encoder_bytes - before.encoder_bytes)
        read = decoder * each.decoder + states * each.encoder + encoder * each.global_model
        return Passes(draft=decoder, draft_parameters=read)
