"""The weights of an engine in full: to read, to call the model with, to leave behind."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn


def full_weights(deepspeed: ModuleType, engine: Any, *, keep: bool) -> dict[str, Tensor]:
    """The float32 ``state_dict`` on the CPU, if ``keep``; every process has to call this.

    A parameter is gathered, and copied if it is kept, before the next one.
    """
    state: dict[str, Tensor] = {}
    seen: dict[int, Tensor] = {}  # a parameter of two names is gathered once
    for name, held in engine.module.state_dict(keep_vars=True).items():
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
            return own.detach().view(getattr(held, "ds_shape", held.shape))
    if hasattr(held, "ds_id") and held.numel() != held.ds_numel:
        with deepspeed.zero.GatheredParameters([held]):
            return held.detach().clone()
    return held.detach()


@contextmanager
def whole_module(deepspeed: ModuleType, engine: Any) -> Iterator[None]:
    """Gather the weights of a stage 3 module in every process for the time of the block.

    The hooks that gather and drop weights around each module call are off meanwhile: they require
    identical calls on every rank and would record evaluation's call order. They are re-registered
    afterwards, and record the order of training again.
    """
    offload = engine.optimizer.parameter_offload
    engine.empty_partition_cache()
    for hook in (*offload.forward_hooks, *offload.backward_hooks):
        hook.remove()
    offload.forward_hooks, offload.backward_hooks = [], []
    try:
        with deepspeed.zero.GatheredParameters(list(engine.module.parameters())):
            yield
    finally:
        offload._register_deepspeed_module(engine.module)  # noqa: SLF001 -- there is no other way


def make_plain(deepspeed: ModuleType, engine: Any) -> None:
    """End an engine; its module keeps its weights, as the plain float32 parameters it began with.

    Every process has to call this. Parameters of the module are new objects.
    """
    module, device = engine.module, engine.device
    state = full_weights(deepspeed, engine, keep=True)
    plain: dict[int, nn.Parameter] = {}
    for name, held in module.state_dict(keep_vars=True).items():
        if isinstance(held, nn.Parameter) and id(held) not in plain:
            plain[id(held)] = nn.Parameter(state[name].to(device), requires_grad=held.requires_grad)
    engine.module_forward_pre_hook.remove()
    engine.module_forward_post_hook.remove()
    engine.destroy()
    for part in module.modules():
        held_here = part._parameters.items()  # noqa: SLF001 -- DeepSpeed put a dict of its own there
        own = {key: p if p is None else plain[id(p)] for key, p in held_here}
        part._parameters = own  # noqa: SLF001
