"""Learning rates, and which parameters decay."""

from __future__ import annotations

import math
from typing import Any

from torch import nn


def learning_rate(
    step: int, *, steps: int, peak: float, warmup_steps: int, final_rate: float
) -> float:
    """Rate of ``step`` (from 0): linear warm-up to ``peak``, then a cosine to its final share."""
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(steps - warmup_steps, 1)
    share = final_rate + (1 - final_rate) * (1 + math.cos(math.pi * progress)) / 2
    return peak * share


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two optimizer groups: matrices of linear layers, which decay, and all the rest."""
    matrices = {id(layer.weight) for layer in module.modules() if isinstance(layer, nn.Linear)}
    decay = [p for p in module.parameters() if id(p) in matrices]
    plain = [p for p in module.parameters() if id(p) not in matrices]
    groups = [
        {"params": decay, "weight_decay": weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]
