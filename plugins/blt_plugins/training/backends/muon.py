"""Muon: steps of orthogonalised momentum, for matrices (Jordan et al., 2024)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

MOMENTUM = 0.95
#: Root mean square of a step at rate 1: that of AdamW's, so that its rate and decay fit
#: (arXiv 2502.16982).
STEP_RMS = 0.2
#: Of the quintic iteration: they raise small singular values fast, and leave all near 1.
COEFFICIENTS = (3.4445, -4.775, 2.0315)
ITERATIONS = 5
_SMALLEST_NORM = 1e-7


class Muon(torch.optim.Optimizer):
    """Moves each matrix by its momentum, made orthogonal; ``stacked`` ones part by part.

    stacked: of parameters that hold several maps on top of one another, the rows of each. Each map
    is orthogonalised by itself, and its step scaled by its own shape.

    Whole matrices take the steps of ``torch.optim.Muon`` with ``adjust_lr_fn="match_rms_adamw"``,
    but for the dtype on a CPU (see :func:`orthogonal`). The state is the same for all: the
    ``momentum_buffer`` of the whole parameter.
    """

    def __init__(
        self,
        groups: Sequence[dict[str, Any]],
        stacked: Mapping[nn.Parameter, Sequence[int]],
    ) -> None:
        super().__init__(groups, {"lr": 0.0, "weight_decay": 0.0})
        self._stacked = stacked

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Apply the gradients. Parameters without one stay as they are."""
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is not None:
                    self._move(weight, group["lr"], group["weight_decay"])

    def _move(self, weight: nn.Parameter, rate: float, decay: float) -> None:
        state = self.state[weight]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(weight)
        momentum = state["momentum_buffer"].lerp_(weight.grad, 1 - MOMENTUM)
        ahead = weight.grad.lerp(momentum, MOMENTUM)  # as Nesterov does
        rows = list(self._stacked.get(weight, weight.shape[:1]))
        weight.mul_(1 - rate * decay)
        for part, direction in zip(weight.split(rows), ahead.split(rows), strict=True):
            scale = STEP_RMS * max(part.shape) ** 0.5
            part.add_(orthogonal(direction), alpha=-rate * scale)


def orthogonal(matrix: Tensor) -> Tensor:
    """(A, B): ``matrix`` with its singular values brought near 1 by Newton-Schulz iteration.

    Computed in bfloat16, which is exact enough; on a CPU in the dtype of ``matrix``, since one
    without bfloat16 arithmetic takes about twenty times as long for bfloat16.
    """
    a, b, c = COEFFICIENTS
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix if matrix.device.type == "cpu" else matrix.bfloat16()
    x = x.T if tall else x
    x = x / x.norm().clamp(min=_SMALLEST_NORM)
    for _ in range(ITERATIONS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if tall else x
