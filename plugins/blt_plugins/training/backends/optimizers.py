"""The optimizers of the torch backend: AdamW alone, or with Muon for the matrices inside.

Muon takes maps that are stacked in one matrix (q, k and v; gate and up) one by one: in pairs of
runs of 200 steps that ended 0.004, 0.02 and 0.06 bits per byte lower than with whole matrices, at
rates 1.5e-3, 3e-3 and 6e-3 (benchmarks/README.md, optimizers.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import nn

from blt_core.nn import Linear
from blt_plugins.training.backends.memory import MOMENTS
from blt_plugins.training.backends.muon import Muon
from blt_plugins.training.backends.parameters import parameter_bytes, parameter_groups

OptimizerName = Literal["adamw", "muon"]
Groups = Sequence[dict[str, Any]]

BETAS = (0.9, 0.95)


def make_optimizers(
    groups: Groups,
    name: OptimizerName,
    *,
    outputs: int,
    fused: bool,
    stacked: Mapping[nn.Parameter, Sequence[int]],
) -> list[torch.optim.Optimizer]:
    """Optimizers of the groups of ``parameter_groups``; the rate, 0, is set at each step.

    muon: :class:`blt_plugins.training.backends.muon.Muon` for matrices; AdamW keeps all the rest,
    and matrices with ``outputs`` rows: a head, each row of which is a class of its own.
    stacked: see :func:`stacked_rows`. fused: AdamW's kernel that touches every parameter once, on
    the CPU too.
    """
    inner, rest = split(groups, name, outputs=outputs)
    found: list[torch.optim.Optimizer] = []
    if inner:
        found.append(Muon(inner, stacked))
    if rest:
        found.append(torch.optim.AdamW(rest, lr=0.0, betas=BETAS, fused=fused))
    return found


def stacked_rows(module: nn.Module) -> dict[nn.Parameter, tuple[int, ...]]:
    """The rows of each map in weights that hold several, as their layers say."""
    return {
        layer.weight: layer.stacked
        for layer in module.modules()
        if isinstance(layer, Linear) and len(layer.stacked) > 1
    }


def split(groups: Groups, name: OptimizerName, *, outputs: int) -> tuple[Groups, Groups]:
    """The groups that Muon takes, and those of AdamW."""

    def pick(group: dict[str, Any], *, inner: bool) -> dict[str, Any]:
        takes = name == "muon" and group["matrices"]
        chosen = [p for p in group["params"] if (takes and p.shape[0] != outputs) is inner]
        return {**group, "params": chosen}

    parts = [[pick(group, inner=inner) for group in groups] for inner in (True, False)]
    muon, adamw = ([group for group in part if group["params"]] for part in parts)
    return muon, adamw


def optimizer_of(names: Iterable[str]) -> OptimizerName | None:
    """Whose state holds tensors of these names; None before a first step."""
    keys = {name.rpartition("|")[2] for name in names}
    if "momentum_buffer" in keys:
        return "muon"
    return "adamw" if "exp_avg" in keys else None


def optimizer_bytes(module: nn.Module, name: OptimizerName, *, outputs: int) -> int:
    """What the optimizers of ``module`` remember: Muon one tensor a matrix, AdamW two of each."""
    muon, adamw = split(parameter_groups(module, 0.0), name, outputs=outputs)
    sizes = [sum(parameter_bytes(group["params"]) for group in groups) for groups in (muon, adamw)]
    return sizes[0] + MOMENTS * sizes[1]
