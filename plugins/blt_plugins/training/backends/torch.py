"""The plain torch backend: one process, or several under torchrun by DDP or FSDP2."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Literal

import attrs
import torch
from safetensors.torch import save_file
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from blt_core.component import BuildContext, Component, at_least
from blt_core.errors import CheckpointError, RunError
from blt_core.storage.safetensors import StoredTensors
from blt_core.types import IdScheme, StateMemory
from blt_plugins.training.backends.memory import replicated, sharded
from blt_plugins.training.backends.optimizers import (
    OptimizerName,
    make_optimizers,
    optimizer_bytes,
    optimizer_of,
    stacked_rows,
)
from blt_plugins.training.backends.side_by_side import SideBySide

#: What ``save`` writes: the whole weights and optimizer, whatever they were spread over.
TENSORS = "training.safetensors"
_WEIGHT, _OPTIMIZER = "weight/", "optimizer/"


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

    strategy: Literal["ddp", "fsdp"] = "ddp"
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
        self._strategy, self._name = params.strategy, params.optimizer
        self.parallel_passes = params.parallel_passes
        self._side_by_side: SideBySide | None = None
        self._outputs = context.scheme.size
        self._sharded = params.strategy == "fsdp" and self.world_size > 1
        self._module: nn.Module = nn.Module()
        self._called: nn.Module = self._module
        self._optimizers: list[torch.optim.Optimizer] = []
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
        self._module = self._called = module
        if self._sharded:
            from blt_plugins.training.backends.sharding import shard

            groups = shard(module, groups)
        elif self.world_size > 1:
            self._called = DistributedDataParallel(module)
        self._optimizers = make_optimizers(
            groups,
            self._name,
            outputs=self._outputs,
            fused=not self._sharded,
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
            self._prepare_pass(last=number == self._accumulate)
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
        return float(self._full(norm))

    def mean(self, values: Sequence[float]) -> list[float]:
        """Each value's mean over the processes."""
        if self.world_size == 1:
            return list(values)
        self._join()
        total = torch.tensor([*values, 0.0], dtype=torch.float64)
        distributed.all_reduce(total)
        means: list[float] = (total[:-1] / self.world_size).tolist()
        return means

    def whole(self) -> AbstractContextManager[None]:
        """Within it every process holds all of the weights."""
        if not self._sharded:
            return nullcontext()
        from blt_plugins.training.backends.sharding import gathered

        return gathered(self._module)

    def weights(self) -> dict[str, Tensor]:
        """The module's whole ``state_dict`` in process 0."""
        return self._gathered(self._module.state_dict())

    def save(self, folder: Path) -> None:
        """Process 0 writes one file."""
        named = self._parameters()
        state = {
            f"{name}|{key}": value
            for optimizer in self._running()
            for name, parameter in named.items()
            for key, value in optimizer.state.get(parameter, {}).items()
        }
        weights = self.weights()
        moments = self._gathered(state)
        if self.rank == 0:
            tensors = {_WEIGHT + name: tensor for name, tensor in weights.items()}
            tensors |= {_OPTIMIZER + name: tensor for name, tensor in moments.items()}
            save_file(tensors, folder / TENSORS)

    def load(self, folder: Path) -> None:
        """Go on from ``save``, of this backend with any strategy and number of processes."""
        path = folder / TENSORS
        if not path.exists():
            raise CheckpointError(
                f"{folder}: holds no {TENSORS}, so another training backend wrote it\n"
                "  fix: go on with that backend, or start anew from OUT/model as [run] checkpoint"
            )
        tensors = StoredTensors(path)
        found = optimizer_of(tensors)
        if found not in (None, self._name):
            raise CheckpointError(
                f"{folder}: holds the state of optimizer {found!r}, not of {self._name!r}\n"
                f"  fix: training_backend.optimizer = {found!r}, or start anew from OUT/model as "
                "[run] checkpoint"
            )
        own, parameters = self._module.state_dict(), self._parameters()
        optimizers = {
            parameter: optimizer
            for optimizer in self._running()
            for group in optimizer.param_groups
            for parameter in group["params"]
        }
        for full in tensors:
            if full.startswith(_WEIGHT):
                name = full.removeprefix(_WEIGHT)
                _known(name, own, folder)
                with torch.no_grad():
                    own[name].copy_(self._like(tensors[full], own[name]))
            else:
                name, _, key = full.removeprefix(_OPTIMIZER).rpartition("|")
                _known(name, parameters, folder)
                value, parameter = tensors[full].clone(), parameters[name]
                optimizers[parameter].state[parameter][key] = (
                    self._like(value, parameter) if value.dim() else value.to(parameter.device)
                )

    def memory(self, module: nn.Module, *, processes: int, accumulate: int) -> StateMemory:
        """What each of ``processes`` keeps while it trains ``module``."""
        if self._strategy == "fsdp":
            found = sharded(module, processes=processes, accumulate=accumulate)
        else:
            kept = optimizer_bytes(module, self._name, outputs=self._outputs)
            found = replicated(module, processes=processes, optimizer=kept)
        return attrs.evolve(found, passes_at_once=self._passes_at_once(processes, accumulate))

    def release(self) -> None:
        """Let the module and its optimizers go; the processes stay together."""
        self._module = self._called = nn.Module()
        self._optimizers = []
        if self._side_by_side is not None:
            self._side_by_side.close()
        self._side_by_side = None

    def close(self) -> None:
        """Let the module and the process group go; without waiting, as others may have died."""
        if self._sharded:
            from blt_plugins.training.backends.sharding import leave_group

            leave_group(self._module)
        self.release()
        if self._owns_group and distributed.is_initialized():
            distributed.destroy_process_group()
        self._owns_group = False

    def _passes_at_once(self, processes: int, accumulate: int) -> int:
        """How many passes of a step a process runs at a time: no more than torch has threads."""
        limit = self.parallel_passes if processes == 1 else 1
        return min(limit, accumulate, torch.get_num_threads())

    def _prepare_pass(self, *, last: bool) -> None:
        """Gradients meet those of the other processes in the last pass of a step alone."""
        if self._sharded:
            self._called.set_requires_gradient_sync(last)  # type: ignore[operator]
        elif isinstance(self._called, DistributedDataParallel):
            self._called.require_backward_grad_sync = last

    def _join(self) -> None:
        """Meet the other processes, once."""
        if self.world_size > 1 and not distributed.is_initialized():
            # Default arguments of its functions are the group that is there when it is imported,
            # and would keep that group, and its threads, into the end of the interpreter.
            import torch.distributed.nn

            distributed.init_process_group(
                "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
            )
            self._owns_group = True

    def _gathered(self, tensors: Mapping[str, Any]) -> dict[str, Tensor]:
        """Whole copies on the CPU in process 0; the others take part and keep nothing."""
        found = {}
        for name, tensor in tensors.items():
            whole = self._full(tensor)
            if self.rank == 0:
                found[name] = whole.detach().to("cpu", copy=True).contiguous()
        return found

    def _full(self, tensor: Tensor) -> Tensor:
        if not self._sharded:
            return tensor
        from blt_plugins.training.backends.sharding import full

        return full(tensor)

    def _like(self, tensor: Tensor, own: Tensor) -> Tensor:
        """``tensor`` on the device of ``own``, and spread as it is."""
        tensor = tensor.to(own.device)
        if not self._sharded:
            return tensor
        from blt_plugins.training.backends.sharding import like

        return like(tensor, own)

    def _parameters(self) -> dict[str, nn.Parameter]:
        return dict(self._module.named_parameters())

    def _running(self) -> list[torch.optim.Optimizer]:
        if not self._optimizers:
            raise RunError("the training backend was not started")
        return self._optimizers


def scorer_backend(backend: object, scheme: IdScheme) -> TorchBackend:
    """What trains the scorer of a run whose model ``backend`` trains.

    A scorer is small, and its parameters are needed whole later: it is never sharded.
    """
    parallel = backend.parallel_passes if isinstance(backend, TorchBackend) else 1
    return TorchBackend(TorchBackendParams(parallel_passes=parallel), BuildContext(scheme))


def _known(name: str, own: Mapping[str, object], folder: Path) -> None:
    if name not in own:
        raise CheckpointError(f"{folder}: has {name!r}, which the trained module does not have")


TORCH_BACKEND = Component(
    kind="training_backend",
    name="torch",
    factory=TorchBackend,
    params=TorchBackendParams,
    summary="plain torch: one process, or DDP and FSDP2 under torchrun",
)
