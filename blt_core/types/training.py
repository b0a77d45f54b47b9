"""What training keeps in memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

import attrs

if TYPE_CHECKING:
    import torch


@attrs.frozen
class StateBytes:
    """Bytes that training holds in one place, from step to step.

    optimizer: with the float32 weights that some backends keep beside narrower ones. buffers: of
    the backend's own, such as those in which gradients travel. step: peak extra bytes during the
    optimizer step, in place of the gradients: copies of them, and workspace (0: none). scoring:
    bytes held during evaluation in place of gradients and buffers: the whole weights, where they
    are sharded at other times (0: none). staging: the copy of a state that is written while
    training goes on, in process 0, which has most of it (0: states are written from what they are
    of).
    """

    parameters: int = 0
    gradients: int = 0
    optimizer: int = 0
    buffers: int = 0
    step: int = 0
    scoring: int = 0
    staging: int = 0

    @property
    def total(self) -> int:
        """What is there between two passes of a step."""
        return self.parameters + self.gradients + self.optimizer + self.buffers + self.staging

    @property
    def stepping(self) -> int:
        """The most while the optimizer steps."""
        return self.total - self.gradients + max(self.gradients, self.step)

    @property
    def scored(self) -> int:
        """Bytes held during evaluation; an upper bound if the backend gathers nothing."""
        return self.parameters + self.optimizer + self.scoring + self.staging


@attrs.frozen
class StateMemory:
    """What a training backend keeps of the module it trains, for each process.

    device: where passes run. host: what was moved to the memory of the CPU. passes_in: the dtype
    that the module is cast to (None: it stays as it is). passes_at_once: how many passes of a step
    run side by side, each with gradients of its own.
    """

    device: StateBytes
    host: StateBytes = StateBytes()
    passes_in: torch.dtype | None = None
    passes_at_once: int = 1
