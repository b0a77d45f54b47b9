"""Replay: a draft stands as far as it is what autoregressive sampling would draw."""

from __future__ import annotations

from collections.abc import Sequence

import attrs
from torch import Tensor

from blt_core.component import BuildContext, Component
from blt_core.types import Draft, Draws, Sampling, matches


@attrs.frozen(kw_only=True)
class ReplayParams:
    """Takes no keys."""


class ReplayVerification:
    """Draw at each row what ``ar`` would draw there, and keep the draft as far as it is equal.

    What a request draws depends on its seed and a byte's position alone, so the bytes are known to
    verification: the output is ``ar``'s, byte for byte, at any temperature, top-k and top-p, for
    any draft. Drafts that are drawn with the same ``draws`` agree more often.
    """

    def __init__(self, params: ReplayParams, context: BuildContext) -> None:
        pass

    def check(self, sampling: Sampling) -> None:
        """Every sampling setting is served."""

    def accept(
        self,
        draft: Draft,
        logits_brV: Tensor,
        positions: Sequence[int],
        active: Sequence[bool],
        sampling: Sampling,
        draws: Draws,
    ) -> tuple[list[int], list[int]]:
        """(accepted ids of each row, the model's own id after them)."""
        rows = [len(ids) + 1 if on else 0 for ids, on in zip(draft.ids, active, strict=True)]
        chosen = sampling.picks(logits_brV, positions, rows, draws)
        accepted = [matches(ids, own) for ids, own in zip(draft.ids, chosen, strict=True)]
        own = [ids[kept] if ids else -1 for ids, kept in zip(chosen, accepted, strict=True)]
        return accepted, own


REPLAY = Component(
    kind="verification",
    name="replay",
    factory=ReplayVerification,
    params=ReplayParams,
    summary="a draft stands as far as it is what ar would draw; at any temperature",
)
