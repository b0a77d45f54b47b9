"""Verifications that are equal to ``ar`` in law: for drafters that tell what they draw from.

Their draws differ from ``ar``'s, so a seed gives other bytes with them. They are here to be
studied: ``replay`` gives ``ar``'s very bytes, and takes any drafter. Axes: b batch rows, r rows,
V ids.
"""

from __future__ import annotations

from collections.abc import Sequence

import attrs
import torch
from torch import Tensor

from blt_core.component import BuildContext, Component
from blt_core.types import Draft, Draws, Sampling
from blt_plugins.verification.laws import DraftLaw, block, rejection

#: Streams of draws of a round: the drafter draws on 0.
_STANDS, _NEXT = 2, 3


@attrs.frozen(kw_only=True)
class SampledParams:
    """Takes no keys."""


class SampledVerification:
    """Draws how much of a draft stands from a law, and the byte after it.

    The law depends on what the draft was drawn from, so drafter and verification draw from random
    numbers of the round, none of which another round uses.
    """

    #: Asks the sampler for draws that are independent of ``ar``'s, and of other rounds'.
    draws_of_round = True

    def __init__(self, law: DraftLaw) -> None:
        self.law = law

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
        """(accepted ids of each row, the id after them)."""
        probs = sampling.probabilities(logits_brV)
        accepted, own = [], []
        for row, (ids, begin, on) in enumerate(zip(draft.ids, positions, active, strict=True)):
            if not on:
                accepted.append(0)
                own.append(-1)
                continue
            p = probs[row, : len(ids) + 1]
            law = self.law(ids, draft.probs(row, p.shape[-1]), p)
            stands = _draw(law.stands_j, draws.uniform(row, begin, _STANDS))
            accepted.append(stands)
            own.append(_draw(law.next_jV[stands], draws.uniform(row, begin, _NEXT)))
        return accepted, own


def _draw(probs: Tensor, uniform: float) -> int:
    """The first place where the sum of the probabilities exceeds ``uniform``."""
    sums = probs.cumsum(0)
    place = int(torch.searchsorted(sums, uniform * float(sums[-1]), right=True))
    return min(place, int(probs.nonzero()[-1]))


class RejectionVerification(SampledVerification):
    """Speculative sampling: each byte by itself."""

    def __init__(self, params: SampledParams, context: BuildContext) -> None:
        super().__init__(rejection)


class BlockVerification(SampledVerification):
    """Block verification: the draft as a whole."""

    def __init__(self, params: SampledParams, context: BuildContext) -> None:
        super().__init__(block)


REJECTION = Component(
    kind="verification",
    name="rejection",
    factory=RejectionVerification,
    params=SampledParams,
    summary="equal to ar in law, byte by byte; for drafters that give q",
    requires=frozenset({"drafter.gives_q"}),
)
BLOCK = Component(
    kind="verification",
    name="block",
    factory=BlockVerification,
    params=SampledParams,
    summary="equal to ar in law, the draft as a whole; for drafters that give q",
    requires=frozenset({"drafter.gives_q"}),
)
