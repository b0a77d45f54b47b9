"""Greedy verification: a draft stands as far as it is what the model would have picked."""

from __future__ import annotations

from collections.abc import Sequence

import attrs
from torch import Tensor

from blt_core.component import BuildContext, Component
from blt_core.errors import RequestError
from blt_core.types import Draft, Draws, Sampling


@attrs.frozen(kw_only=True)
class GreedyParams:
    """Takes no keys."""


class GreedyVerification:
    """Keep the longest prefix of the draft that equals the model's own choice at each row.

    Exact at temperature 0 only, so it refuses any other.
    """

    def __init__(self, params: GreedyParams, context: BuildContext) -> None:
        pass

    def check(self, sampling: Sampling) -> None:
        """Raise RequestError unless sampling is greedy."""
        if not sampling.greedy:
            raise RequestError(
                "verification 'greedy' is exact at temperature 0 only, "
                f"got {sampling.temperature}. Set temperature = 0, or use the sampler 'ar'"
            )

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
        accepted, own = [], []
        choices = logits_brV.argmax(-1).tolist()
        for ids, chosen, on in zip(draft.ids, choices, active, strict=True):
            kept = next((i for i, token in enumerate(ids) if token != chosen[i]), len(ids))
            accepted.append(kept if on else 0)
            own.append(chosen[kept] if on else -1)
        return accepted, own


GREEDY = Component(
    kind="verification",
    name="greedy",
    factory=GreedyVerification,
    params=GreedyParams,
    summary="a draft stands as far as it equals the model's greedy choice",
)
