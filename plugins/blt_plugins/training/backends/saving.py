"""The state of the torch backend on the disk: whole weights and optimizer, in one file.

Whatever they were spread over, any strategy and number of processes can go on from it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from blt_core.errors import CheckpointError
from blt_core.storage.safetensors import StoredTensors
from blt_plugins.training.backends.optimizers import optimizer_of
from blt_plugins.training.backends.strategies import Alone

TENSORS = "training.safetensors"
_WEIGHT, _OPTIMIZER = "weight/", "optimizer/"


def save(
    folder: Path, module: nn.Module, optimizers: Iterable[Optimizer], strategy: Alone, *, main: bool
) -> None:
    """Write one file, in the ``main`` process; the others take part."""
    named = dict(module.named_parameters())
    state = {
        f"{name}|{key}": value
        for optimizer in optimizers
        for name, parameter in named.items()
        for key, value in optimizer.state.get(parameter, {}).items()
    }
    weights = whole_tensors(module.state_dict(), strategy, main=main)
    moments = whole_tensors(state, strategy, main=main)
    if main:
        tensors = {_WEIGHT + name: tensor for name, tensor in weights.items()}
        tensors |= {_OPTIMIZER + name: tensor for name, tensor in moments.items()}
        save_file(tensors, folder / TENSORS)


def load(
    folder: Path, module: nn.Module, optimizers: Sequence[Optimizer], strategy: Alone, name: str
) -> None:
    """Put back what :func:`save` wrote; ``name`` of the optimizer.

    Raises CheckpointError for the state of another backend, optimizer or module.
    """
    tensors = _stored(folder, name)
    own, parameters = module.state_dict(), dict(module.named_parameters())
    keepers = {
        parameter: optimizer
        for optimizer in optimizers
        for group in optimizer.param_groups
        for parameter in group["params"]
    }

    def spread(tensor: Tensor, like: Tensor) -> Tensor:
        return strategy.like(tensor.to(like.device), like)

    for full in tensors:
        if full.startswith(_WEIGHT):
            key = full.removeprefix(_WEIGHT)
            _known(key, own, folder)
            with torch.no_grad():
                own[key].copy_(spread(tensors[full], own[key]))
        else:
            of, _, key = full.removeprefix(_OPTIMIZER).rpartition("|")
            _known(of, parameters, folder)
            value, parameter = tensors[full].clone(), parameters[of]
            keepers[parameter].state[parameter][key] = (
                spread(value, parameter) if value.dim() else value.to(parameter.device)
            )


def whole_tensors(tensors: Mapping[str, Any], strategy: Alone, *, main: bool) -> dict[str, Tensor]:
    """Whole copies on the CPU in the ``main`` process; the others take part and keep nothing."""
    found = {}
    for name, tensor in tensors.items():
        whole = strategy.full(tensor)
        if main:
            found[name] = whole.detach().to("cpu", copy=True).contiguous()
    return found


def _stored(folder: Path, name: str) -> StoredTensors:
    path = folder / TENSORS
    if not path.exists():
        raise CheckpointError(
            f"{folder}: holds no {TENSORS}, so another training backend wrote it\n"
            "  fix: go on with that backend, or start anew from OUT/model as [run] checkpoint"
        )
    tensors = StoredTensors(path)
    found = optimizer_of(tensors)
    if found not in (None, name):
        raise CheckpointError(
            f"{folder}: holds the state of optimizer {found!r}, not of {name!r}\n"
            f"  fix: training_backend.optimizer = {found!r}, or start anew from OUT/model as "
            "[run] checkpoint"
        )
    return tensors


def _known(name: str, own: Mapping[str, object], folder: Path) -> None:
    if name not in own:
        raise CheckpointError(f"{folder}: has {name!r}, which the trained module does not have")
