"""The plain torch backend: one process, AdamW, gradient clipping."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import attrs
import torch
from torch import Tensor, nn

from blt_core.component import BuildContext, Component
from blt_core.errors import CheckpointError, RunError

BETAS = (0.9, 0.95)


@attrs.frozen(kw_only=True)
class TorchBackendParams:
    """Nothing to set."""


class TorchBackend:
    """AdamW on the parameters of one module."""

    def __init__(self, params: TorchBackendParams, context: BuildContext) -> None:
        self._optimizer: torch.optim.AdamW | None = None
        self._parameters: dict[str, nn.Parameter] = {}
        self._clip, self._accumulate = 1.0, 1

    def start(
        self,
        module: nn.Module,
        groups: Sequence[dict[str, Any]],
        *,
        clip: float,
        accumulate: int,
    ) -> None:
        """Begin to train ``module``; what was trained before is let go."""
        self._parameters = dict(module.named_parameters())
        # lr is set at each step; the fused kernel touches every parameter once, on the CPU too.
        self._optimizer = torch.optim.AdamW(list(groups), lr=0.0, betas=BETAS, fused=True)
        self._clip, self._accumulate = clip, accumulate
        self._optimizer.zero_grad(set_to_none=True)

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of one of ``accumulate`` passes."""
        (loss / self._accumulate).backward()

    def step(self, learning_rate: float) -> float:
        """Apply the gradients; returns their norm before clipping."""
        optimizer = self._running()
        norm = nn.utils.clip_grad_norm_(self._parameters.values(), self._clip)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(norm)

    def state(self) -> dict[str, Tensor]:
        """The optimizer's tensors, named ``parameter|quantity``."""
        state = self._running().state
        return {
            f"{name}|{key}": tensor
            for name, parameter in self._parameters.items()
            for key, tensor in state.get(parameter, {}).items()
        }

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Continue from what ``state`` gave. Raises CheckpointError for unknown parameters."""
        optimizer = self._running()
        for full, tensor in tensors.items():
            name, _, key = full.rpartition("|")
            if name not in self._parameters:
                raise CheckpointError(f"optimizer state of {name!r}, which the model does not have")
            parameter = self._parameters[name]
            optimizer.state[parameter][key] = tensor.clone().to(parameter.device)

    def _running(self) -> torch.optim.AdamW:
        if self._optimizer is None:
            raise RunError("the training backend was not started")
        return self._optimizer


TORCH_BACKEND = Component(
    kind="training_backend",
    name="torch",
    factory=TorchBackend,
    params=TorchBackendParams,
    summary="one process, plain torch",
)
