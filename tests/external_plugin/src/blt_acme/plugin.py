"""The hooks of this distribution."""

from __future__ import annotations

from blt_acme.commas import COMMAS
from blt_acme.energy import ENERGY
from blt_acme.gru import GRU
from blt_acme.observer import blt_run_end, blt_run_start, blt_run_step
from blt_acme.tree import TREE
from blt_core import Component, hookimpl

__all__ = ["blt_components", "blt_run_end", "blt_run_start", "blt_run_step"]


@hookimpl
def blt_components() -> list[Component]:
    """All components."""
    return [TREE, COMMAS, GRU, ENERGY]
