"""Tables whose rows are spread over processes, which exchange the rows that a pass reads.

FSDP2 would gather a table whole in each process, and its gradient too. Here no process ever holds
more than its own rows, those that its pass reads, and gradients of both.

Axes: n rows that are summed, u different rows that a process reads, a rows that it is asked for,
D width.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.autograd.function import once_differentiable
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from torch.nn import functional

from blt_core.nn import RowTable

#: Into one tensor, without a copy; its name before torch 2.13.
_gather = getattr(distributed, "all_gather_single", distributed.all_gather_into_tensor)


class SpreadTable:
    """Looks up rows of ``table``, whose weight becomes a DTensor: an even run of rows a process.

    Set as the table's ``spread``. A pass of each process, with as many rows as it likes, none
    included, meets one of all others: they exchange numbers and rows, and in the backward pass
    gradients of rows. The gradient of the weight is the mean over the processes, as FSDP2's, dense
    and of the process's own rows.
    """

    def __init__(self, table: RowTable, mesh: DeviceMesh) -> None:
        whole = table.weight.detach()
        self.group = mesh.get_group()
        processes = distributed.get_world_size(self.group)
        self.share = -(-len(whole) // processes)
        self.first = distributed.get_rank(self.group) * self.share
        own = whole[self.first : self.first + self.share].clone()  # lets the whole go
        self._ends = [self.share * (number + 1) for number in range(processes)]
        self._table = table
        self._whole: Tensor | None = None
        spread = DTensor.from_local(
            own, mesh, [Shard(0)], run_check=False, shape=whole.shape, stride=whole.stride()
        )
        table.weight = nn.Parameter(spread, requires_grad=table.weight.requires_grad)
        table.spread = self

    def __call__(self, numbers: Tensor) -> Tensor:
        """As ``RowTable.forward``."""
        if self._whole is not None:
            return functional.embedding(numbers, self._whole).sum(-2)
        wanted, places = numbers.unique(return_inverse=True)
        weight: Any = self._table.weight
        rows: Tensor = _Exchange.apply(  # type: ignore[no-untyped-call]
            weight.to_local(), wanted, self
        )
        return functional.embedding(places, rows).sum(-2)

    def asked(self, wanted: Tensor) -> tuple[Tensor, list[int], list[int]]:
        """(own rows that others want (a), how many each wants, how many of ``wanted`` each has).

        wanted: different numbers in order.
        """
        ends = torch.searchsorted(wanted, torch.tensor(self._ends, device=wanted.device))
        mine = ends.diff(prepend=ends.new_zeros(1))
        theirs = torch.empty_like(mine)
        distributed.all_to_all_single(theirs, mine, group=self.group)
        there, here = mine.tolist(), theirs.tolist()
        return self.exchange(wanted, there, here) - self.first, here, there

    def exchange(self, rows: Tensor, sent: list[int], got: list[int]) -> Tensor:
        """Send so many rows to each process; what each has sent, in their order."""
        found = rows.new_empty(sum(got), *rows.shape[1:])
        distributed.all_to_all_single(found, rows.contiguous(), got, sent, group=self.group)
        return found

    def gather(self) -> None:
        """Hold all rows until :meth:`release`; all processes take part."""
        weight: Any = self._table.weight
        local: Tensor = weight.to_local().detach()
        padded = functional.pad(local, (0, 0, 0, self.share - len(local)))
        whole = local.new_empty(len(self._ends) * self.share, *local.shape[1:])
        _gather(whole, padded, group=self.group)
        self._whole = whole[: len(self._table.weight)]

    def release(self) -> None:
        """Hold the process's own rows alone."""
        self._whole = None

    @property
    def processes(self) -> int:
        """How many hold rows."""
        return len(self._ends)


class _Exchange(torch.autograd.Function):
    """Rows (u, D) of all processes' weights, by their numbers."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, wanted: Tensor, table: SpreadTable) -> Tensor:
        asked, here, there = table.asked(wanted)
        ctx.save_for_backward(asked)
        ctx.table, ctx.here, ctx.there, ctx.rows = table, here, there, len(own)
        return table.exchange(own[asked], here, there)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (asked,) = ctx.saved_tensors
        returned = ctx.table.exchange(grad, ctx.there, ctx.here)
        summed = returned.new_zeros(ctx.rows, *returned.shape[1:])
        return summed.index_add_(0, asked, returned).div_(ctx.table.processes), None, None


def spread_tables(module: nn.Module) -> Iterator[SpreadTable]:
    """Those within ``module``."""
    for part in module.modules():
        if isinstance(part, RowTable) and isinstance(part.spread, SpreadTable):
            yield part.spread


def leave(module: nn.Module) -> None:
    """Have the tables of ``module`` hold nothing of the process group."""
    for part in module.modules():
        if isinstance(part, RowTable):
            part.spread = None
