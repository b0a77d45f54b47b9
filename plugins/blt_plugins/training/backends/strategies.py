"""How several processes share a step: each holds the whole model (DDP), or a part of it (FSDP2)."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from blt_core.types import StateMemory
from blt_plugins.training.backends.memory import replicated, sharded
from blt_plugins.training.backends.traffic import replicated_traffic, sharded_traffic

Groups = Sequence[dict[str, Any]]


class Alone:
    """A single process, which shares nothing."""

    #: Whether parameters are plain tensors, as fused optimizers ask for.
    plain = True

    def wrap(self, module: nn.Module, groups: Groups) -> tuple[nn.Module, Groups]:
        """What is called in place of ``module``, and the optimizer groups of what it holds."""
        return module, groups

    def sync(self, called: nn.Module, *, active: bool) -> None:
        """Whether gradients of the coming pass meet those of the other processes."""

    def whole(self, module: nn.Module) -> AbstractContextManager[None]:
        """Within it every process holds all weights of ``module``."""
        return nullcontext()

    def release(self, module: nn.Module) -> None:
        """Let go of what :meth:`whole` holds, before the weights are read one by one."""

    def full(self, tensor: Tensor) -> Tensor:
        """The whole of a tensor, wherever its parts are; all processes take part."""
        return tensor

    def part(self, tensor: Tensor) -> tuple[Tensor, int | None]:
        """The rows that this process alone keeps, and the first of them; None: each has all."""
        return tensor, None

    def spread(self, rows: Tensor, own: Tensor) -> Tensor:
        """The rows that this process keeps, as part of a tensor that is spread as ``own`` is."""
        return rows

    def leave(self, module: nn.Module) -> None:
        """Have ``module`` hold nothing of the process group, which is about to end."""

    def memory(
        self, module: nn.Module, *, processes: int, accumulate: int, optimizer: int
    ) -> StateMemory:
        """What each process keeps; optimizer: bytes of a whole optimizer's state."""
        return replicated(module, processes=processes, optimizer=optimizer)

    def traffic(self, module: nn.Module, *, processes: int, accumulate: int, row_bytes: int) -> int:
        """Bytes that each process sends in a step; row_bytes: of the rows of tables in a pass."""
        return replicated_traffic(module, processes=processes)


class Ddp(Alone):
    """Each process holds the whole model; gradients are averaged in the last pass of a step."""

    def wrap(self, module: nn.Module, groups: Groups) -> tuple[nn.Module, Groups]:
        """The module in DDP."""
        return DistributedDataParallel(module), groups

    def sync(self, called: nn.Module, *, active: bool) -> None:
        """Whether DDP averages after the coming pass."""
        called.require_backward_grad_sync = active


class Fsdp(Alone):
    """Weights, gradients and optimizer are spread over the processes (FSDP2), layer by layer.

    Gradients are reduced in each pass: if they met in the last one alone, each process would keep
    whole ones until then, which no number of processes makes smaller.
    What shards is imported when it is called: that takes seconds.
    """

    plain = False

    def wrap(self, module: nn.Module, groups: Groups) -> tuple[nn.Module, Groups]:
        """The module, whose parameters are shards from now on, and groups of these."""
        from blt_plugins.training.backends.sharding import shard

        return module, shard(module, groups)

    def whole(self, module: nn.Module) -> AbstractContextManager[None]:
        """Within it every layer is gathered."""
        from blt_plugins.training.backends.sharding import gathered

        return gathered(module)

    def release(self, module: nn.Module) -> None:
        """Let go of the rows of tables; layers let go of themselves where they are read."""
        from blt_plugins.training.backends.sharding import release_tables

        release_tables(module)

    def full(self, tensor: Tensor) -> Tensor:
        """The shards of all processes in one."""
        from blt_plugins.training.backends.sharding import full

        return full(tensor)

    def part(self, tensor: Tensor) -> tuple[Tensor, int | None]:
        """This process's shard of a tensor that is spread."""
        from blt_plugins.training.backends.sharding import part

        return part(tensor)

    def spread(self, rows: Tensor, own: Tensor) -> Tensor:
        """A tensor whose shard in this process is ``rows``."""
        from blt_plugins.training.backends.sharding import spread

        return spread(rows, own)

    def leave(self, module: nn.Module) -> None:
        """Take the group out of the module, which may outlive it."""
        from blt_plugins.training.backends.sharding import leave_group

        leave_group(module)

    def memory(
        self, module: nn.Module, *, processes: int, accumulate: int, optimizer: int
    ) -> StateMemory:
        """A part of all, and what is gathered at a time."""
        return sharded(module, processes=processes, accumulate=accumulate)

    def traffic(self, module: nn.Module, *, processes: int, accumulate: int, row_bytes: int) -> int:
        """What is gathered and reduced in each pass."""
        return sharded_traffic(
            module, processes=processes, accumulate=accumulate, row_bytes=row_bytes
        )


StrategyName = Literal["ddp", "fsdp"]
STRATEGIES: dict[str, type[Alone]] = {"ddp": Ddp, "fsdp": Fsdp}
