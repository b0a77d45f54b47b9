"""Verified sampling: a drafter proposes bytes, the full model verifies them in one pass.

With verification by replay (the default) the output is byte for byte that of autoregressive
sampling with the same seed, at any temperature, whatever the drafter proposes.
Axes: b batch rows, r rows of a pass, V ids.
"""

from __future__ import annotations

import attrs

from blt_core.component import BuildContext, Component, nested
from blt_core.decoding.drafting import propose, verify
from blt_core.protocols import DecodeOps, Drafter, Verification
from blt_core.types import Draft, Draws, Round, Sampling


@attrs.frozen(kw_only=True)
class SpeculativeParams:
    """drafter: proposes bytes. verification: decides which of them stand."""

    drafter: Drafter = nested("drafter", default="self")
    verification: Verification = nested("verification", default="replay")


class Speculative:
    """Draft, append, verify in one pass, rewind what is rejected, append the model's own byte.

    The first round drafts nothing: it reads the prompt and yields the first byte.
    """

    true_logits = True

    def __init__(self, params: SpeculativeParams, context: BuildContext) -> None:
        self.drafter = params.drafter
        self.verification = params.verification
        self.in_law = bool(getattr(self.verification, "draws_of_round", False))

    def check(self, sampling: Sampling) -> None:
        """Refuse what the verification cannot do exactly (RequestError)."""
        self.verification.check(sampling)

    def round(self, ops: DecodeOps, sampling: Sampling, draws: Draws) -> Round:
        """Accepted drafts and one byte of the model's own, to every unfinished row."""
        fresh, begin, active = ops.fresh, ops.lengths, [left > 0 for left in ops.remaining]
        # One byte of what remains is the model's own, so a draft leaves room for it.
        limit = [0 if fresh else max(left - 1, 0) for left in ops.remaining]
        if self.in_law:
            draws = draws.of_round(begin)
        draft = Draft([[] for _ in active])
        if any(limit):
            draft = propose(self.drafter, ops, limit, sampling, draws)
            ops.rewind(begin)
        ops.append(draft.ids)
        rows = [len(ids) + 1 if on else 0 for ids, on in zip(draft.ids, active, strict=True)]
        logits = ops.next_logits(rows)
        accepted, own = verify(self.verification, draft, logits, begin, active, sampling, draws)
        ops.rewind([n + kept for n, kept in zip(begin, accepted, strict=True)])
        ops.append([[token] if on else [] for token, on in zip(own, active, strict=True)])
        committed = [
            [*ids[:kept], token] if on else []
            for ids, kept, token, on in zip(draft.ids, accepted, own, active, strict=True)
        ]
        return Round(committed, [len(ids) for ids in draft.ids], accepted, prefill=fresh)


SPECULATIVE = Component(
    kind="sampler",
    name="speculative",
    factory=Speculative,
    params=SpeculativeParams,
    summary="a drafter proposes, the full model verifies in one pass",
)
