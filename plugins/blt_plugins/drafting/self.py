"""The drafter of BLT-S: the local decoder alone, with the latents frozen."""

from __future__ import annotations

from collections.abc import Sequence

import attrs
import torch
from torch import Tensor

from blt_core.component import BuildContext, Component, at_least
from blt_core.protocols import DecodeOps
from blt_core.types import Draft, Draws, Sampling, StopRule


@attrs.frozen(kw_only=True)
class SelfParams:
    """draft_bytes: how many bytes are drafted a round (k)."""

    draft_bytes: int = attrs.field(default=8, validator=at_least(1))


class SelfDrafter:
    """Writes k bytes, one decoder pass each, reading the newest latent for all of them.

    Patch boundaries are ignored (Fast BLT, BLT-S). Above temperature 0 a byte is drawn with the
    draws that verification uses for it, so that both mostly agree. A row stops drafting at EOS.
    """

    def __init__(self, params: SelfParams, context: BuildContext) -> None:
        self.draft_bytes = params.draft_bytes

    def draft(
        self,
        ops: DecodeOps,
        limit: Sequence[int],
        sampling: Sampling,
        draws: Draws,
        rule: StopRule | None = None,
    ) -> Draft:
        """At most ``draft_bytes`` ids of each row, and what they were drawn from."""
        ids: list[list[int]] = [[] for _ in limit]
        steps: list[Tensor] = []
        left = [min(self.draft_bytes, most) for most in limit]
        while any(left):
            rows = [int(n > 0) for n in left]
            logits = ops.draft_logits(rows)
            if rule is not None:
                beliefs = sampling.belief(logits)
                rows = [on and rule(row, beliefs[row]) for row, on in enumerate(rows)]
            new = sampling.picks(logits, ops.lengths, rows, draws)
            ops.append(new)
            steps.append(logits)
            for row, token in enumerate(new):
                ids[row].extend(token)
                left[row] = 0 if token in ([], [ops.scheme.eos]) else left[row] - 1
        wanted = steps and draws.begins is not None
        return Draft(ids, sampling.probabilities(torch.cat(steps, dim=1)) if wanted else None)


SELF = Component(
    kind="drafter",
    name="self",
    factory=SelfDrafter,
    params=SelfParams,
    summary="the local decoder alone, latents frozen (BLT-S)",
    provides=lambda _: frozenset({"stops_early", "gives_q"}),
)
