"""Learning rates, and which parameters decay."""

from __future__ import annotations

import math
from typing import Literal

import attrs

Shape = Literal["cosine", "constant", "wsd"]


@attrs.frozen(kw_only=True)
class Schedule:
    """The learning rate of every step of a phase.

    All shapes warm up linearly over ``warmup_steps`` to ``peak``. cosine: then half a cosine down
    to ``final_rate`` times the peak. constant: then the peak. wsd (warm-up, stable, decay): the
    peak, and over the last ``decay_share`` of the steps a straight line to that final rate.
    """

    steps: int
    peak: float
    warmup_steps: int
    shape: Shape = "cosine"
    final_rate: float = 0.1
    decay_share: float = 0.2

    def rate(self, step: int) -> float:
        """Rate of ``step`` (from 0)."""
        if step < self.warmup_steps:
            return self.peak * (step + 1) / self.warmup_steps
        return self.peak * (self.final_rate + (1 - self.final_rate) * self._height(step))

    def _height(self, step: int) -> float:
        """Where between the final rate (0) and the peak (1) the rate of a step lies."""
        if self.shape == "constant":
            return 1.0
        if self.shape == "cosine":
            progress = (step - self.warmup_steps) / max(self.steps - self.warmup_steps, 1)
            return (1 + math.cos(math.pi * progress)) / 2
        # The warm-up comes first: a decay that would begin within it begins at its end.
        length = min(max(self.steps * self.decay_share, 1), max(self.steps - self.warmup_steps, 1))
        return min((self.steps - step) / length, 1.0)
