"""The drafter of BLT-S: the local decoder alone, with the latents frozen."""

from __future__ import annotations

from collections.abc import Sequence

import attrs

from blt_core.component import BuildContext, Component, at_least
from blt_core.protocols import DecodeOps
from blt_core.types import Draft, Draws, Sampling


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
    ) -> Draft:
        """At most ``draft_bytes`` ids of each row."""
        ids: list[list[int]] = [[] for _ in limit]
        for count in range(self.draft_bytes):
            rows = [
                int(count < most and (not done or done[-1] != ops.scheme.eos))
                for done, most in zip(ids, limit, strict=True)
            ]
            if not any(rows):
                break
            new = sampling.picks(ops.draft_logits(rows), ops.lengths, rows, draws)
            ops.append(new)
            for done, token in zip(ids, new, strict=True):
                done.extend(token)
        return Draft(ids)


SELF = Component(
    kind="drafter",
    name="self",
    factory=SelfDrafter,
    params=SelfParams,
    summary="the local decoder alone, latents frozen (BLT-S)",
)
