"""A drafter that stops where it is no longer sure of itself."""

from __future__ import annotations

from collections.abc import Sequence

import attrs
from torch import Tensor

from blt_core.component import BuildContext, Component, abilities_of, between, nested
from blt_core.decoding.drafting import propose
from blt_core.protocols import DecodeOps, Drafter
from blt_core.types import Draft, Draws, Sampling, StopRule


@attrs.frozen(kw_only=True)
class UntilParams:
    """probability: a draft ends where the product of its top probabilities falls below this.

    drafter: one that can stop early; no pass is run for what comes after.
    """

    probability: float = attrs.field(default=0.3, validator=between(0, 1))
    drafter: Drafter = nested("drafter", default="self")


class UntilDrafter:
    """Drafts as the inner drafter does, as long as the draft is likely to be right whole.

    The product of the largest probabilities estimates how likely the whole draft stands. It depends
    on what was drafted before, never on the byte in question, so that the law of that byte stays.
    """

    def __init__(self, params: UntilParams, context: BuildContext) -> None:
        self.probability, self.drafter = params.probability, params.drafter

    def draft(
        self,
        ops: DecodeOps,
        limit: Sequence[int],
        sampling: Sampling,
        draws: Draws,
        rule: StopRule | None = None,
    ) -> Draft:
        """The beginning of the inner drafter's draft that is likely enough, for each row."""
        likely = [1.0] * len(limit)

        def keep(row: int, beliefs_kV: Tensor) -> tuple[int, bool]:
            most, goes_on = rule(row, beliefs_kV) if rule is not None else (len(beliefs_kV), True)
            for count, top in enumerate(beliefs_kV[:most].amax(-1).tolist()):
                likely[row] *= top
                if likely[row] < self.probability:
                    return count, False
            return most, goes_on

        return propose(self.drafter, ops, limit, sampling, draws, keep)


UNTIL = Component(
    kind="drafter",
    name="until",
    factory=UntilDrafter,
    params=UntilParams,
    summary="stops an inner drafter where its draft is no longer likely",
    requires=frozenset({"drafter.stops_early"}),
    provides=lambda params: abilities_of(params.drafter),
)
