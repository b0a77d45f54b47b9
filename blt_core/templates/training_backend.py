"""A training backend: AdamW in one process, on the CPU or whatever device the module is on.

Change ``OneProcess``. A step is ``accumulate`` passes whose gradients are averaged, then one update
after clipping; ``save`` and ``load`` go on as if the run had never stopped.

Try it:    blt plugins test training_backend acme/name
Contracts: docs/kinds/training_backend.md
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import attrs
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from blt_core import BuildContext, CheckpointError, Component, between, hookimpl

STATE = "state.safetensors"

#: What configs call the component.
NAME = "acme/name"


@attrs.frozen(kw_only=True)
class OneProcessParams:
    """beta2: AdamW's, of the squares of gradients."""

    beta2: float = attrs.field(default=0.95, validator=between(0, 1))


class OneProcess:
    """``rank`` and ``world_size`` are known from the start; several processes need more."""

    def __init__(self, params: OneProcessParams, context: BuildContext) -> None:
        self.beta2 = params.beta2
        self.rank, self.world_size = 0, 1
        self._module: nn.Module = nn.Module()
        self._optimizer: torch.optim.Optimizer | None = None
        self._clip, self._accumulate = 1.0, 1

    def start(
        self,
        module: nn.Module,
        groups: Sequence[dict[str, Any]],
        *,
        clip: float,
        accumulate: int,
    ) -> nn.Module:
        """Begin to train ``module``; what trained before is let go."""
        self._module, self._clip, self._accumulate = module, clip, accumulate
        kept = [{"params": each["params"], "weight_decay": each["weight_decay"]} for each in groups]
        self._optimizer = torch.optim.AdamW(kept, lr=0.0, betas=(0.9, self.beta2))
        self._optimizer.zero_grad()
        return module

    def backward(self, losses: Iterable[Callable[[], Tensor]]) -> None:
        """Add the gradients of a step's passes, averaged."""
        for loss in losses:
            torch.autograd.backward(loss() / self._accumulate)

    def step(self, learning_rate: float) -> float:
        """Update the weights; the gradients' norm before they were clipped."""
        optimizer = self._started()
        norm = nn.utils.clip_grad_norm_(self._module.parameters(), self._clip)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate
        optimizer.step()
        optimizer.zero_grad()
        return float(norm)

    def _started(self) -> torch.optim.Optimizer:
        if self._optimizer is None:
            raise RuntimeError("start comes first")
        return self._optimizer

    def mean(self, values: Sequence[float]) -> list[float]:
        """The mean over one process: the values."""
        return list(values)

    def whole(self) -> AbstractContextManager[None]:
        """The module is always whole."""
        return nullcontext()

    def weights(self) -> dict[str, Tensor]:
        """Copies of all weights, on the CPU."""
        state = self._module.state_dict()
        return {name: tensor.detach().cpu().clone() for name, tensor in state.items()}

    def save(self, folder: Path) -> None:
        """Weights and the optimizer's moments, in one file that runs no code when it is read."""
        weights = {f"weights/{name}": each for name, each in self._module.state_dict().items()}
        state = self._started().state_dict()["state"]
        moments = {
            f"optimizer/{number}/{key}": each
            for number, kept in state.items()
            for key, each in kept.items()
        }
        tensors = {name: each.detach().clone() for name, each in (weights | moments).items()}
        save_file(tensors, folder / STATE)

    def load(self, folder: Path) -> None:
        """Go on from what ``save`` wrote."""
        try:
            tensors = load_file(folder / STATE)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{folder / STATE}: cannot be read; start anew") from error
        weights: dict[str, Tensor] = {}
        moments: dict[int, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            kind, _, rest = name.partition("/")
            if kind == "weights":
                weights[rest] = tensor
            else:
                number, _, key = rest.partition("/")
                moments.setdefault(int(number), {})[key] = tensor
        self._module.load_state_dict(weights)
        optimizer = self._started()
        optimizer.load_state_dict({**optimizer.state_dict(), "state": moments})

    def close(self) -> None:
        """Let the module go."""
        self._module, self._optimizer = nn.Module(), None


@hookimpl
def blt_components() -> list[Component]:
    """The backend."""
    summary = "AdamW in one process"
    return [Component("training_backend", NAME, OneProcess, OneProcessParams, summary)]
