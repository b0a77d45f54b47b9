"""What plain torch sends in a step: DDP, FSDP2. Bytes that each process sends, by ring algorithms.

A gather or a reduce-scatter of X bytes among N processes sends (N - 1) / N of X, an all-reduce
twice that. What overlaps with passes is not known here.
"""

from __future__ import annotations

from torch import nn

from blt_plugins.training.backends.parameters import parameter_bytes, unit_bytes


def ring(size: int, processes: int) -> int:
    """Sent by each process where ``size`` bytes are gathered, or reduced and scattered."""
    return size * (processes - 1) // processes


def replicated_traffic(module: nn.Module, *, processes: int) -> int:
    """DDP: all gradients are reduced once a step."""
    return 2 * ring(parameter_bytes(module.parameters()), processes)


def sharded_traffic(module: nn.Module, *, processes: int, accumulate: int, row_bytes: int) -> int:
    """FSDP2: what each pass gathers (layers twice, the root once) and reduces, and rows of tables.

    Rows travel forward, and their gradients back; their numbers are small beside them.
    """
    root, layers, _ = unit_bytes(module)
    return accumulate * ring(2 * root + 3 * sum(layers) + 2 * row_bytes, processes)
