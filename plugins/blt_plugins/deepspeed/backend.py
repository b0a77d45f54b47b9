"""The training backend ``deepspeed``: ZeRO data parallelism on the engine of DeepSpeed."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from blt_core.component import BuildContext, Component
from blt_core.errors import BltError, CheckpointError, RunError
from blt_core.nn import read_weights_whole
from blt_core.types import StateMemory
from blt_plugins.deepspeed import internals
from blt_plugins.deepspeed.memory_plan import Zero, check_gathers, zero_memory, zero_traffic
from blt_plugins.deepspeed.process import import_deepspeed, join_group, leave_group
from blt_plugins.deepspeed.resume import TAG, Topology, converted, needs_conversion, read_topology
from blt_plugins.deepspeed.settings import DeepSpeedBackendParams, deepspeed_config
from blt_plugins.deepspeed.versions import check_installed
from blt_plugins.deepspeed.weights import full_weights, make_plain, whole_module

BETAS = (0.9, 0.95)


class DeepSpeedBackend:
    """AdamW on a DeepSpeed engine, which averages over passes and processes by itself.

    Raises PluginError where DeepSpeed is not installed. It is imported by the first ``start``,
    which raises PluginError too where something that is used here is missing in it.
    """

    def __init__(self, params: DeepSpeedBackendParams, context: BuildContext) -> None:
        check_installed()
        self.rank = int(os.environ.get("RANK", "0"))
        self.world_size = int(os.environ.get("WORLD_SIZE", "1"))
        self._params = params
        self._topology = Topology(params.stage, self.world_size, params.weight_dtype)
        self._package: ModuleType | None = None
        self._running: Any = None
        self._module, self._device = nn.Module(), torch.device("cpu")
        self._optimizer: torch.optim.Optimizer | None = None
        self._clip, self._accumulate = 0.0, 1
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
        """Begin to train ``module`` with AdamW; returns the engine.

        The weights of process 0 are those of all. The former module is left with its weights in
        full, as plain float32 parameters. Raises RunError for a module that is not float32, and
        for a weight that is too large to be gathered.
        """
        self._release()
        first = next(module.parameters())
        if first.dtype != torch.float32:
            raise RunError(
                f"the training backend 'deepspeed' trains float32 models, not {first.dtype}\n"
                "  fix: remove dtype from [run]"
            )
        config = deepspeed_config(
            self._params,
            # At stage 0 the engine clips, but does not tell the norm.
            clip=clip if self._params.stage else 0.0,
            accumulate=accumulate,
            world_size=self.world_size,
        )
        check_gathers(_sizes(module), Zero.of(config))
        package = self._package = import_deepspeed(first.device)
        join_group(package, first.device)
        self._clip, self._accumulate = clip, accumulate
        if self._spreads_weights:
            read_weights_whole(module)
        optimizer = torch.optim.AdamW(list(groups), lr=0.0, betas=BETAS)
        engine: nn.Module
        engine, *_ = package.initialize(model=module, optimizer=optimizer, config=config)
        internals.check_engine(engine, module, self._params.stage)
        self._running, self._optimizer = engine, optimizer
        self._module, self._device = module, first.device
        return engine

    def backward(self, losses: Iterable[Callable[[], Tensor]]) -> None:
        """Add the gradients of ``accumulate`` passes, one after another."""
        engine = self._engine()
        for number, loss in enumerate(losses, start=1):
            engine.backward(loss())
            if number < self._accumulate:
                engine.step()  # counts the pass; the optimizer steps after the last one only

    def step(self, learning_rate: float) -> float:
        """Apply the gradients; returns their norm before clipping."""
        engine = self._engine()
        for group in engine.optimizer.param_groups:
            group["lr"] = learning_rate
        norm: Any = None
        if self._params.stage == 0:
            norm = nn.utils.clip_grad_norm_(self._module.parameters(), self._clip)
        engine.step()
        value = internals.gradient_norm(engine) if norm is None else float(norm)
        return value if value >= 0 else math.nan  # -1 stands for a norm that is no number

    def mean(self, values: Sequence[float]) -> list[float]:
        """Each value's mean over the processes."""
        self._engine()
        # The last one makes a sum of no values a barrier too.
        sums = torch.tensor([*values, 0.0], dtype=torch.float64, device=self._device)
        torch.distributed.all_reduce(sums)
        means: list[float] = (sums[:-1] / self.world_size).tolist()
        return means

    def whole(self) -> AbstractContextManager[None]:
        """Within it every process holds all weights, and calls of parts involve no other."""
        engine = self._engine()
        if not self._spreads_weights:
            return contextlib.nullcontext()
        return whole_module(self._deepspeed(), engine, self._module)

    def weights(self) -> dict[str, Tensor]:
        """The float32 ``state_dict`` in process 0, gathered a tensor at a time."""
        self._engine()
        return full_weights(self._deepspeed(), self._module, keep=self.rank == 0)

    def save(self, folder: Path) -> None:
        """Write the engine's checkpoint, a file for each process, and what it depends on."""
        try:
            self._engine().save_checkpoint(str(folder), tag=TAG)
        except OSError as error:
            raise RunError(f"{folder}: {error.strerror or error}") from error
        if self.rank == 0:
            self._topology.write(folder)
        self._barrier()

    def load(self, folder: Path) -> None:
        """Go on from ``folder``, converted where stage or number of processes differ.

        Raises CheckpointError for a state that is missing or damaged, or that does not fit.
        """
        if not needs_conversion(read_topology(folder), self._topology, folder):
            self._load(folder, TAG)
            return
        with (
            converted(folder, first=self.rank == 0, barrier=self._barrier) as universal,
            internals.loading_universal(self._engine()),
        ):
            self._load(universal, "step")

    def memory(self, module: nn.Module, *, processes: int, accumulate: int) -> StateMemory:
        """What each of ``processes`` keeps while it trains ``module``.

        Raises RunError for a weight that is too large to be gathered.
        """
        config = deepspeed_config(
            self._params, clip=1.0, accumulate=accumulate, world_size=processes
        )
        sizes, zero = _sizes(module), Zero.of(config)
        check_gathers(sizes, zero)
        return zero_memory(list(sizes.values()), zero, processes=processes)

    def traffic(self, module: nn.Module, *, processes: int, accumulate: int, row_bytes: int) -> int:
        """Bytes that each of ``processes`` sends in a step; tables travel whole."""
        config = deepspeed_config(
            self._params, clip=1.0, accumulate=accumulate, world_size=processes
        )
        parameters = sum(_sizes(module).values())
        return zero_traffic(parameters, Zero.of(config), processes=processes, accumulate=accumulate)

    def close(self) -> None:
        """Let the engine and the process group go; the module's weights are not gathered."""
        if self._running is not None:
            internals.destroy(self._running)
            self._running = self._optimizer = None
            self._module = nn.Module()
        if self._package is not None:
            leave_group(self._package)
            self._package = None

    # -- helpers ---------------------------------------------------------------------------------

    @property
    def _spreads_weights(self) -> bool:
        """Whether each process keeps a part of every weight, and borrows it whole for a call."""
        return self._params.stage == 3  # noqa: PLR2004 -- the stage

    def _load(self, folder: Path, tag: str) -> None:
        engine = self._engine()
        settings = [_settings(group) for group in engine.optimizer.param_groups]
        try:
            path, _ = engine.load_checkpoint(str(folder), tag=tag)
        except BltError:
            raise
        except Exception as error:  # unpickling, shapes, missing files: whatever is wrong in them
            raise CheckpointError(f"{folder}: DeepSpeed cannot read this state: {error}") from error
        if path is None:
            raise CheckpointError(f"{folder}: DeepSpeed finds no state here")
        # A converted state of stage 3 gives every group the weight decay of the first, and one
        # tensor that counts the steps, which each group would then count up.
        for group, kept in zip(engine.optimizer.param_groups, settings, strict=True):
            group.update(kept)
        for state in self._optimizer.state.values() if self._optimizer else ():
            state["step"] = state["step"].clone()

    def _release(self) -> None:
        if self._running is not None:
            engine, self._running = self._running, None
            make_plain(self._deepspeed(), engine, self._module, self._device)
            self._module, self._optimizer = nn.Module(), None

    def _barrier(self) -> None:
        torch.distributed.barrier()

    def _engine(self) -> Any:
        if self._running is None:
            raise RunError("the training backend was not started")
        return self._running

    def _deepspeed(self) -> ModuleType:
        if self._package is None:
            raise RunError("the training backend was not started")
        return self._package


def _sizes(module: nn.Module) -> dict[str, int]:
    """How many numbers each weight has."""
    return {name: parameter.numel() for name, parameter in module.named_parameters()}


def _settings(group: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key != "params"}


DEEPSPEED_BACKEND = Component(
    kind="training_backend",
    name="deepspeed",
    factory=DeepSpeedBackend,
    params=DeepSpeedBackendParams,
    summary="one or many processes, ZeRO stages 0 to 3 of DeepSpeed",
)
