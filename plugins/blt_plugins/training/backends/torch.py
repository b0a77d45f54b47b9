"""The plain torch backend: one process, or several under torchrun by DDP or FSDP2."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import attrs
import torch
from torch import Tensor, distributed, nn

from blt_core.component import BuildContext, Component, at_least
from blt_core.errors import RunError
from blt_core.faults import remember
from blt_core.storage.folders import file_errors
from blt_core.types import IdScheme, StateMemory
from blt_plugins.training.backends import saving
from blt_plugins.training.backends.optimizers import (
    OptimizerName,
    make_optimizers,
    optimizer_bytes,
    stacked_rows,
)
from blt_plugins.training.backends.side_by_side import SideBySide
from blt_plugins.training.backends.strategies import STRATEGIES, Alone, StrategyName


@attrs.frozen(kw_only=True)
class TorchBackendParams:
    """strategy: how several processes share the work. ddp: each holds the whole model.

    fsdp: weights, gradients and optimizer are spread over them (FSDP2), layer by layer. Nothing is
    spread in a single process, one that was not started by torchrun.
    optimizer: adamw, or muon, which learns more from each step and takes longer for it; see
    :func:`blt_plugins.training.backends.optimizers.make_optimizers`. It needs whole matrices: no
    fsdp.
    parallel_passes: at most so many passes of a step run side by side and share torch's threads, if
    there is a single process; faster on a CPU, and each takes memory of its own.
    """

    strategy: StrategyName = "ddp"
    optimizer: OptimizerName = "adamw"
    parallel_passes: int = attrs.field(default=1, validator=at_least(1))

    def __attrs_post_init__(self) -> None:
        if self.optimizer == "muon" and self.strategy == "fsdp":
            raise ValueError("optimizer: muon needs whole matrices, and fsdp spreads them: use ddp")


class TorchBackend:
    """Trains the parameters of one module, in as many processes as torchrun started."""

    def __init__(self, params: TorchBackendParams, context: BuildContext) -> None:
        self.rank = int(os.environ.get("RANK", "0"))
        self.world_size = int(os.environ.get("WORLD_SIZE", "1"))
        self._of_several = STRATEGIES[params.strategy]()
        self._strategy = self._of_several if self.world_size > 1 else Alone()
        self._name = params.optimizer
        self.parallel_passes = params.parallel_passes
        self._side_by_side: SideBySide | None = None
        self._outputs = context.scheme.size
        self._module: nn.Module = nn.Module()
        self._called: nn.Module = self._module
        self._optimizers: list[torch.optim.Optimizer] = []
        self._staging = saving.Staging()
        self._clip, self._accumulate = 1.0, 1
        self._owns_group = False
        if self.world_size > 1 and torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))

    def start(
        self,
        module: nn.Module,
        groups: Sequence[dict[str, Any]],
        *,
        clip: float,
        accumulate: int,
    ) -> nn.Module:
        """Begin to train ``module``; what was trained before is let go."""
        self.release()
        self._join()
        self._module = module
        self._called, groups = self._strategy.wrap(module, groups)
        self._optimizers = make_optimizers(
            groups,
            self._name,
            outputs=self._outputs,
            fused=self._strategy.plain,
            stacked=stacked_rows(module),
        )
        self._clip, self._accumulate = clip, accumulate
        if (count := self._passes_at_once(self.world_size, accumulate)) > 1:
            self._side_by_side = SideBySide(count)
        module.zero_grad(set_to_none=True)
        return self._called

    def backward(self, losses: Iterable[Callable[[], Tensor]]) -> None:
        """Add the gradients of ``accumulate`` passes; the last one shares them out."""
        if self._side_by_side is not None:
            trained = [each for each in self._module.parameters() if each.requires_grad]
            self._side_by_side.add(losses, trained, accumulate=self._accumulate)
            return
        for number, loss in enumerate(losses, start=1):
            # Gradients meet those of the other processes in the last pass of a step alone.
            self._strategy.sync(self._called, active=number == self._accumulate)
            (loss() / self._accumulate).backward()

    def step(self, learning_rate: float) -> float:
        """Apply the gradients; returns their norm before clipping."""
        optimizers = self._running()
        norm = nn.utils.clip_grad_norm_(self._module.parameters(), self._clip)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate
            optimizer.step()
        self._module.zero_grad(set_to_none=True)
        return float(self._strategy.full(norm))

    def mean(self, values: Sequence[float]) -> list[float]:
        """Each value's mean over the processes."""
        if self.world_size == 1:
            return list(values)
        self._join()
        total = torch.tensor([*values, 0.0], dtype=torch.float64)
        distributed.all_reduce(total)
        means: list[float] = (total[:-1] / self.world_size).tolist()
        return means

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Within it every process holds all of the weights."""
        # A frame of this backend, so that errors of the gathering are named after it.
        with self._strategy.whole(self._module):
            yield

    def weights(self) -> dict[str, Tensor]:
        """The module's whole ``state_dict`` in process 0."""
        self._strategy.release(self._module)
        return saving.whole_tensors(self._module.state_dict(), self._strategy, main=self.rank == 0)

    def save(self, folder: Path) -> None:
        """Process 0 writes one file; with fsdp each process writes what it keeps.

        Raises RunError in all processes where one cannot.
        """
        error: Exception | None = None
        try:
            with file_errors(folder, RunError):
                saving.write(folder, self._part(), rank=self.rank, processes=self.world_size)
        except Exception as raised:  # noqa: BLE001 -- raised again, when the others know
            error = raised
        (failed,) = self.mean([float(error is not None)])
        if error is not None:
            raise error
        if failed:
            raise RunError(
                f"{folder}: another process could not write its part of the state\n"
                "  fix: see the message of that process; the state before is whole"
            )

    def stage(self) -> Callable[[Path], Sequence[Path]]:
        """Copy what this process would save; returns what writes the copy, in any thread."""
        part = self._part()
        copied = attrs.evolve(part, tensors=self._staging.copy(part.tensors))
        return partial(saving.write, part=copied, rank=self.rank, processes=self.world_size)

    def load(self, folder: Path) -> None:
        """Go on from ``save``, of this backend with any strategy and number of processes."""
        saving.load(folder, self._module, self._running(), self._strategy, self._name)

    def memory(self, module: nn.Module, *, processes: int, accumulate: int) -> StateMemory:
        """What each of ``processes`` keeps while it trains ``module``."""
        found = self._of_several.memory(
            module,
            processes=processes,
            accumulate=accumulate,
            optimizer=optimizer_bytes(module, self._name, outputs=self._outputs),
        )
        return attrs.evolve(found, passes_at_once=self._passes_at_once(processes, accumulate))

    def traffic(self, module: nn.Module, *, processes: int, accumulate: int, row_bytes: int) -> int:
        """Bytes that each of ``processes`` sends in a step."""
        return self._of_several.traffic(
            module, processes=processes, accumulate=accumulate, row_bytes=row_bytes
        )

    def release(self) -> None:
        """Let the module and its optimizers go; the processes stay together."""
        self._module = self._called = nn.Module()
        self._optimizers = []
        self._staging = saving.Staging()
        if self._side_by_side is not None:
            self._side_by_side.close()
        self._side_by_side = None

    def close(self) -> None:
        """Let the module and the process group go; without waiting, as others may have died."""
        self._strategy.leave(self._module)
        self.release()
        if self._owns_group and distributed.is_initialized():
            distributed.destroy_process_group()
        self._owns_group = False

    def _part(self) -> saving.Part:
        return saving.own_part(self._module, self._running(), self._strategy, rank=self.rank)

    def _passes_at_once(self, processes: int, accumulate: int) -> int:
        """How many passes of a step a process runs at a time: no more than torch has threads."""
        limit = self.parallel_passes if processes == 1 else 1
        return min(limit, accumulate, torch.get_num_threads())

    def _join(self) -> None:
        """Meet the other processes, once."""
        if self.world_size > 1 and not distributed.is_initialized():
            # Default arguments of its functions are the group that is there when it is imported,
            # and would keep that group, and its threads, into the end of the interpreter.
            import torch.distributed.nn

            backends = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
            try:
                distributed.init_process_group(backends)
            except RuntimeError as error:
                raise RunError(
                    f"the {self.world_size} processes of this run have not met: {error}\n"
                    "  fix: see the messages of the other processes; on several machines, see that "
                    "each reaches the address of the first"
                ) from error
            self._owns_group = True

    def _running(self) -> list[torch.optim.Optimizer]:
        if not self._optimizers:
            raise RunError("the training backend was not started")
        return self._optimizers


def scorer_backend(backend: object, scheme: IdScheme) -> TorchBackend:
    """What trains the scorer of a run whose model ``backend`` trains.

    A scorer is small, and its parameters are needed whole later: it is never sharded.
    """
    parallel = backend.parallel_passes if isinstance(backend, TorchBackend) else 1
    found = TorchBackend(TorchBackendParams(parallel_passes=parallel), BuildContext(scheme))
    remember(found, "training backend 'torch' (blt-core)")
    return found


TORCH_BACKEND = Component(
    kind="training_backend",
    name="torch",
    factory=TorchBackend,
    params=TorchBackendParams,
    summary="plain torch: one process, or DDP and FSDP2 under torchrun",
)
