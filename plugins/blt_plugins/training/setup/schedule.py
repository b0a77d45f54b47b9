"""Learning rates, and which parameters decay."""

from __future__ import annotations

import math
from typing import Any, Literal

import attrs
from torch import nn

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


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two optimizer groups: matrices of linear layers, which decay, and all the rest.

    A group's ``matrices`` says which it is.
    """
    matrices = {id(layer.weight) for layer in module.modules() if isinstance(layer, nn.Linear)}
    decay = [p for p in module.parameters() if id(p) in matrices]
    plain = [p for p in module.parameters() if id(p) not in matrices]
    groups = [
        {"params": decay, "weight_decay": weight_decay, "matrices": True},
        {"params": plain, "weight_decay": 0.0, "matrices": False},
    ]
    return [group for group in groups if group["params"]]
