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
        accepted, own = [0] * len(active), [-1] * len(active)
        for count in {len(ids) for ids in draft.ids}:
            rows = [b for b, on in enumerate(active) if on and len(draft.ids[b]) == count]
            if not rows:
                continue
            ids_bk = torch.tensor([draft.ids[row] for row in rows], dtype=torch.long)
            q_bkV = torch.stack([draft.probs(row, probs.shape[-1]) for row in rows])
            law = self.law(ids_bk, q_bkV, probs[rows, : count + 1])
            keys = [(row, positions[row]) for row in rows]
            stands = _drawn(law.stands_j, [draws.uniform(*key, _STANDS) for key in keys])
            laws_bV = law.next_jV[range(len(rows)), stands]
            following = _drawn(laws_bV, [draws.uniform(*key, _NEXT) for key in keys])
            for row, kept, token in zip(rows, stands, following, strict=True):
                accepted[row], own[row] = kept, token
        return accepted, own


def _drawn(probs_bX: Tensor, uniforms: Sequence[float]) -> list[int]:
    """For each row the first place where the sum of the probabilities exceeds its number."""
    sums_bX = probs_bX.cumsum(-1)
    reached = torch.tensor(uniforms, dtype=sums_bX.dtype)[:, None] * sums_bX[:, -1:]
    places = torch.searchsorted(sums_bX, reached, right=True)[:, 0]
    last = probs_bX.shape[-1] - 1 - (probs_bX > 0).flip(-1).int().argmax(-1)
    found: list[int] = torch.minimum(places, last).tolist()
    return found


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
