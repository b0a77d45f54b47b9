"""The drafter of BLT-S: the local decoder alone, with the latents frozen."""

from __future__ import annotations

from collections.abc import Sequence

import attrs

from blt_core.component import BuildContext, Component, at_least
from blt_core.decoding.drafting import draft_alone
from blt_core.protocols import DecodeOps
from blt_core.types import Draft, Draws, Sampling, StopRule
from blt_plugins.drafting.writing import write


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
        most = [min(self.draft_bytes, left) for left in limit]
        if rule is None and draws.begins is None:
            return Draft(draft_alone(ops, most, sampling, draws))
        return write(ops, most, ops.draft_logits, sampling, draws, rule)


SELF = Component(
    kind="drafter",
    name="self",
    factory=SelfDrafter,
    params=SelfParams,
    summary="the local decoder alone, latents frozen (BLT-S)",
    provides=lambda _: frozenset({"stops_early", "gives_q"}),
)
