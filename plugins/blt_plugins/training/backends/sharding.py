"""FSDP2 sharding. Imported lazily because importing it is slow."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from blt_core.errors import RunError
from blt_plugins.training.backends.parameters import gathered_layers, spreadable_tables
from blt_plugins.training.backends.spread_tables import SpreadTable, leave, spread_tables


def shard(module: nn.Module, groups: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Spread ``module``; its optimizer groups with the parameters that it has now.

    Each layer that is called as a module is gathered by itself, the rest of the module at once. The
    rows of tables stay where they are.
    """
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    _check_ties(module, names)
    kind = next(module.parameters()).device.type
    mesh = init_device_mesh(kind, (torch.distributed.get_world_size(),))
    for table in spreadable_tables(module):
        SpreadTable(table, mesh)
    apart: set[nn.Parameter] = {table.weight for table in spreadable_tables(module)}
    for layer in gathered_layers(module):
        fully_shard(layer, mesh=mesh, ignored_params=apart)
    fully_shard(module, mesh=mesh, ignored_params=apart)
    sharded = dict(module.named_parameters())
    return [{**g, "params": [sharded[names[id(p)]] for p in g["params"]]} for g in groups]


def _check_ties(module: nn.Module, names: Mapping[int, str]) -> None:
    """Raise RunError for a weight of two units, which one of them would spread alone."""
    layers = [layer.parameters() for layer in gathered_layers(module)]
    inside = Counter(id(p) for layer in layers for p in layer)
    all_uses = Counter(id(p) for child in module.modules() for p in child.parameters(recurse=False))
    within = Counter(
        id(p)
        for layer in gathered_layers(module)
        for child in layer.modules()
        for p in child.parameters(recurse=False)
    )
    tied = [names[key] for key, n in inside.items() if n > 1 or all_uses[key] > within[key]]
    if tied:
        raise RunError(
            f"fsdp gathers layers one at a time, and {', '.join(tied)} is tied to a weight outside "
            "of its layer\n  fix: training_backend.strategy = 'ddp', or tie weights within a layer"
        )


@contextmanager
def gathered(module: nn.Module) -> Iterator[None]:
    """Within it every process holds all weights of ``module``, and calls its parts by itself.

    Layers keep their weights after a call; otherwise the next call would gather them again, with
    all processes.
    """
    # The first module that is called would become the root for good: a layer, before any step.
    module._get_fsdp_state()._lazy_init()  # type: ignore[operator]  # noqa: SLF001 -- nothing public
    units = [unit for unit in module.modules() if isinstance(unit, FSDPModule)]
    layers = [unit for unit in units if unit is not module]
    for layer in layers:
        layer.set_reshard_after_forward(False, recurse=False)
    for table in spread_tables(module):
        table.gather()
    for unit in units:
        unit.unshard()
    try:
        yield
    finally:
        release_tables(module)
        for layer in layers:
            layer.set_reshard_after_forward(True, recurse=False)
        for unit in units:
            unit.reshard()
        _forget_calls(module)


def _forget_calls(module: nn.Module) -> None:
    """Forget in which order units were called.

    Only a backward pass does so by itself. Otherwise the next one would gather what was called
    before its first unit, in a score, and that only in processes that had something to score.
    """
    for state, groups in _states(module):
        state._comm_ctx.post_forward_order.clear()  # noqa: SLF001 -- nothing public
        for group in groups:
            group._post_forward_indices.clear()  # noqa: SLF001 -- nothing public


def _states(module: nn.Module) -> Iterator[tuple[Any, list[Any]]]:
    """The state of each unit, and its groups of parameters."""
    for unit in module.modules():
        if isinstance(unit, FSDPModule):
            state: Any = unit._get_fsdp_state()  # noqa: SLF001 -- nothing public leads to it
            one = getattr(state, "_fsdp_param_group", None)
            yield state, list(getattr(state, "_fsdp_param_groups", [one] if one else []))


def release_tables(module: nn.Module) -> None:
    """Let go of rows that :func:`gathered` holds."""
    for table in spread_tables(module):
        table.release()


def leave_group(module: nn.Module) -> None:
    """Drop the process group from a sharded module, which can only be read afterwards.

    The module may outlive the group, and DTensor's caches keep its mesh for good; either would keep
    the group's threads running into the end of the interpreter, which aborts the process.
    """
    leave(module)
    for _, groups in _states(module):
        for each in groups:
            each.mesh_info.shard_process_group = None
            getattr(each.mesh_info.mesh, "_pg_registry", {}).clear()


def full(tensor: Tensor) -> Tensor:
    """The whole of a tensor, wherever its parts are."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def part(tensor: Tensor) -> tuple[Tensor, int | None]:
    """This process's rows of a spread tensor, and the first of them; None: it is not spread."""
    if not isinstance(tensor, DTensor):
        return tensor, None
    share = -(-len(tensor) // tensor.device_mesh.size())
    return tensor.to_local(), min(share * tensor.device_mesh.get_local_rank(), len(tensor))


def spread(rows: Tensor, own: Tensor) -> Tensor:
    """A tensor that is spread as ``own`` is, of which this process has ``rows``."""
    if not isinstance(own, DTensor):
        return rows
    return DTensor.from_local(
        rows,
        own.device_mesh,
        own.placements,
        run_check=False,
        shape=own.shape,
        stride=own.stride(),
    )
