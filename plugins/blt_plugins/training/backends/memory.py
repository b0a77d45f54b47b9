"""What plain torch keeps of a module in training: one process, DDP, FSDP2.

AdamW holds two moments a parameter, in the dtype of the parameter.
"""

from __future__ import annotations

from torch import nn

from blt_core.types import StateBytes, StateMemory
from blt_plugins.training.backends.parameters import parameter_bytes, unit_bytes

MOMENTS = 2


def replicated(module: nn.Module, *, processes: int, optimizer: int | None = None) -> StateMemory:
    """One process, or DDP: everything whole in each. optimizer: its bytes, where not AdamW's.

    Between several processes gradients travel in buckets, which DDP makes as large as the gradients
    and keeps.
    """
    size = parameter_bytes(module.parameters())
    buckets = size if processes > 1 else 0
    kept = MOMENTS * size if optimizer is None else optimizer
    return StateMemory(StateBytes(size, size, kept, buckets))


def sharded(module: nn.Module, *, processes: int, accumulate: int) -> StateMemory:
    """FSDP2: everything spread evenly over the processes, and units gathered for their passes.

    The root is whole from its forward pass on, and so is its gradient until the pass ends. Of the
    layers two are whole at a time, the one in use and the next, and one gradient. Gradients are
    reduced in each pass. Tables are never gathered in training: a pass makes a gradient of the
    process's own rows, and adds it to that of the passes before. Unfused AdamW needs two
    temporaries of the size of the current parameter's shard. Evaluation gathers all: the tables,
    then the root and the layers, each through a copy of its own.
    """
    if processes == 1:
        return replicated(module, processes=1)
    size = parameter_bytes(module.parameters())
    share = -(-size // processes)
    root, layers, tables = unit_bytes(module)
    largest = max(layers, default=0)
    gradients = root + largest + (-(-tables // processes) if accumulate > 1 else 0)
    gathered = root + 2 * largest + gradients
    step = share + 2 * -(-max(parameter_bytes([p]) for p in module.parameters()) // processes)
    scoring = max(tables + 2 * root, size + largest)
    return StateMemory(StateBytes(share, share, MOMENTS * share, gathered, step, scoring))
