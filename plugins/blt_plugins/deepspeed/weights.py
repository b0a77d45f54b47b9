"""The weights of an engine in full: to read, to call the model with, to leave behind."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from blt_plugins.deepspeed import internals


def full_weights(deepspeed: ModuleType, module: nn.Module, *, keep: bool) -> dict[str, Tensor]:
    """The float32 ``state_dict`` on the CPU, if ``keep``; every process has to call this.

    A parameter is gathered, and copied if it is kept, before the next one.
    """
    state: dict[str, Tensor] = {}
    seen: dict[int, Tensor] = {}  # a parameter of two names is gathered once
    for name, held in module.state_dict(keep_vars=True).items():
        if id(held) not in seen:
            whole = _whole(deepspeed, held)
            dtype = torch.float32 if whole.is_floating_point() else whole.dtype
            seen[id(held)] = whole.to("cpu", dtype, copy=True) if keep else held
        state[name] = seen[id(held)]
    return state if keep else {}


def _whole(deepspeed: ModuleType, held: Tensor) -> Tensor:
    """A parameter or buffer in full; the float32 one where the optimizer keeps its own."""
    if held.requires_grad:
        own: Tensor | None = deepspeed.utils.safe_get_full_fp32_param(held)
        if own is not None:
            return own.detach().view(internals.full_shape(held))
    if internals.is_apart(held):
        with deepspeed.zero.GatheredParameters([held]):
            return held.detach().clone()
    return held.detach()


@contextmanager
def whole_module(deepspeed: ModuleType, engine: Any, module: nn.Module) -> Iterator[None]:
    """Gather the weights of a stage 3 module in every process for the time of the block.

    The hooks that gather and drop weights around each module call are off meanwhile, so that each
    process may call parts as often as it likes.
    """
    with (
        internals.without_layer_hooks(engine, module),
        deepspeed.zero.GatheredParameters(list(module.parameters())),
    ):
        yield


def make_plain(deepspeed: ModuleType, engine: Any, module: nn.Module, device: torch.device) -> None:
    """End an engine; its module keeps its weights, as the plain float32 parameters it began with.

    Every process has to call this. Parameters of the module are new objects.
    """
    state = full_weights(deepspeed, module, keep=True)
    plain: dict[int, nn.Parameter] = {}
    for name, held in module.state_dict(keep_vars=True).items():
        if isinstance(held, nn.Parameter) and id(held) not in plain:
            plain[id(held)] = nn.Parameter(state[name].to(device), requires_grad=held.requires_grad)
    internals.take_out(engine)
    internals.set_parameters(module, plain)
