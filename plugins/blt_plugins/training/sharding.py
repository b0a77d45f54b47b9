"""FSDP2 sharding. Imported lazily because importing it is slow."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from blt_plugins.training.memory_plan import gathered_layers


def shard(module: nn.Module, groups: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Spread ``module``; its optimizer groups with the parameters that it has now.

    Each layer that is called as a module is gathered by itself, the rest of the module at once.
    """
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    kind = next(module.parameters()).device.type
    mesh = init_device_mesh(kind, (torch.distributed.get_world_size(),))
    for layer in gathered_layers(module):
        fully_shard(layer, mesh=mesh)
    fully_shard(module, mesh=mesh)
    sharded = dict(module.named_parameters())
    return [{**g, "params": [sharded[names[id(p)]] for p in g["params"]]} for g in groups]


@contextmanager
def gathered(module: nn.Module) -> Iterator[None]:
    """Within it every process holds all weights of ``module``."""
    units = [unit for unit in module.modules() if isinstance(unit, FSDPModule)]
    for unit in units:
        unit.unshard()
    yield
    for unit in units:
        unit.reshard()


def full(tensor: Tensor) -> Tensor:
    """The whole of a tensor, wherever its parts are."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def like(tensor: Tensor, own: Tensor) -> Tensor:
    """A whole tensor, spread as ``own`` is."""
    return (
        distribute_tensor(tensor, own.device_mesh, own.placements)
        if isinstance(own, DTensor)
        else tensor
    )
