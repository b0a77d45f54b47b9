"""Greedy verification: a draft stands as far as it is what the model would have picked."""

from __future__ import annotations

import attrs

from blt_core.component import Component
from blt_core.errors import RequestError
from blt_core.types import Sampling
from blt_plugins.verification.replay import ReplayVerification


@attrs.frozen(kw_only=True)
class GreedyParams:
    """Takes no keys."""


class GreedyVerification(ReplayVerification):
    """As ``replay`` at temperature 0; it refuses any other, for those who want nothing drawn."""

    def check(self, sampling: Sampling) -> None:
        """Raise RequestError unless sampling is greedy."""
        if not sampling.greedy:
            raise RequestError(
                f"verification 'greedy' serves temperature 0 only, got {sampling.temperature}\n"
                "  fix: set temperature = 0, or use verification 'replay', the default"
            )


GREEDY = Component(
    kind="verification",
    name="greedy",
    factory=GreedyVerification,
    params=GreedyParams,
    summary="a draft stands as far as it equals the model's greedy choice",
)
