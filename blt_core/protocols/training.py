"""What training runs: an objective, and a backend that takes its steps."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from blt_core.types import Rows, StateMemory


#: A target that is not scored: padding.
UNSCORED = -100
#: Figures that a run writes into its log itself, and how names of its scores begin.
RESERVED_FIGURES = (
    *("phase", "step", "loss", "lr", "grad_norm", "bytes_per_second"),
    *("threshold", "bits_per_byte", "mean_patch_bytes"),
)
RESERVED_PREFIXES = ("masked_accuracy/", "accepted/")


@runtime_checkable
class Objective(Protocol):
    """A loss over a batch of clean rows, with the figures it wants logged.

    ``loss`` (nats a byte) is a mean over the rows whose target (b, r) is not UNSCORED. ``model`` is
    a :class:`blt_core.model.Model`; place i of ``flags_br`` is flag i + 1. Random choices are drawn
    from ``rng`` alone, a generator of the CPU on every device, which is seeded anew for each step.

    Figures are numbers by name, the same names for every batch; those of the run's own
    (``RESERVED_FIGURES``) are refused. An attribute ``block_bytes``
    (optional) is the size, or the sizes, of the blocks that it trains a decoder on, which the
    checkpoint then tells.
    """

    def loss(
        self,
        model: Any,
        rows: Rows,
        flags_br: Tensor,
        targets_br: Tensor,
        rng: torch.Generator,
    ) -> tuple[Tensor, dict[str, float]]: ...


@runtime_checkable
class TrainingBackend(Protocol):
    """Runs optimizer steps on a module: in one process, data-parallel or sharded.

    A run of several processes makes every call in each of them, in the same order. ``rank`` and
    ``world_size`` are known from the start; a process group is there from ``start`` to ``close``,
    and may be there before.
    """

    rank: int
    world_size: int

    def start(
        self,
        module: nn.Module,
        groups: Sequence[dict[str, Any]],
        *,
        clip: float,
        accumulate: int,
    ) -> nn.Module:
        """Begin to train ``module``; returns what to call in its place.

        AdamW, or an optimizer of the backend's own, on ``groups`` (dicts of "params",
        "weight_decay" and "matrices": whether they are the weights of linear layers), gradients
        clipped to the norm ``clip``. A step is a ``backward`` of ``accumulate`` passes in each
        process, then ``step``. A later start lets the former module go.
        """
        ...

    def backward(self, losses: Iterable[Callable[[], Tensor]]) -> None:
        """Run a step's passes and add their gradients; the mean over passes and processes counts.

        Each function calls what ``start`` gave and returns the loss of one pass. The iterable is
        read in this thread, as passes begin; a backend may call several functions at once, in
        threads, where each draws from a generator of its own.
        """
        ...

    def step(self, learning_rate: float) -> float:
        """Apply the accumulated gradients; returns their norm before clipping."""
        ...

    def mean(self, values: Sequence[float]) -> list[float]:
        """Each value's mean over the processes, the same in all of them; also a barrier."""
        ...

    def whole(self) -> AbstractContextManager[None]:
        """Within it the parts of the module can be called themselves, for scores; no training.

        Calls wait for no other process: each scores a share of its own, in as many calls as that
        takes.
        """
        ...

    def weights(self) -> dict[str, Tensor]:
        """The module's ``state_dict`` in full in process 0, on the CPU; empty in the others."""
        ...

    def save(self, folder: Path) -> None:
        """Write weights and optimizer into an existing folder, for ``load``."""
        ...

    def load(self, folder: Path) -> None:
        """Go on from what ``save`` wrote, perhaps in another number of processes.

        Raises CheckpointError, which says what to do instead, where that is not possible.
        """
        ...

    def close(self) -> None:
        """Let the module and the process group go."""
        ...


@runtime_checkable
class BackgroundSaver(Protocol):
    """An optional ability of a training backend: to be saved while training goes on.

    ``stage`` copies what this process would save into memory of the CPU, which is whole when it
    returns. What it returns writes the copy into an existing folder and gives the files that it has
    written: those of all processes together are what ``save`` writes. It is called in another
    thread, waits for no other process, and has returned before the next ``stage``.
    """

    def stage(self) -> Callable[[Path], Sequence[Path]]: ...


@runtime_checkable
class MemoryPlanner(Protocol):
    """An optional ability of a training backend: to say what it keeps, for ``blt train --plan``.

    ``memory`` is asked before any ``start``, about a module whose parameters hold no data, and for
    any number of processes, whatever ``world_size`` the backend itself has. accumulate: as in
    ``start``, the passes of a step in each process.
    """

    def memory(self, module: nn.Module, *, processes: int, accumulate: int) -> StateMemory: ...


@runtime_checkable
class TrafficPlanner(Protocol):
    """An optional ability of a training backend: to say what it sends, for ``blt train --plan``.

    ``traffic`` gives the bytes that each process sends to others in one step. It is asked as
    ``MemoryPlanner.memory`` is. row_bytes: of the rows that a pass reads in tables
    (``blt_core.nn.RowTable``), at most.
    """

    def traffic(
        self, module: nn.Module, *, processes: int, accumulate: int, row_bytes: int
    ) -> int: ...
