"""What DeepSpeed keeps of a module in training, by ZeRO stage and offloading.

Read from DeepSpeed 0.19.8; state that is spread is padded by a few bytes, which are left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import attrs
import torch

from blt_core.errors import RunError
from blt_core.types import StateBytes, StateMemory

#: The optimizer's float32 weights and its two moments.
_FULL, _MOMENTS = 4, 2 * 4
#: Unfused AdamW needs two float32 temporaries of the size of the current parameter.
_WORKSPACE = 2 * 4
_SPLIT_GRADIENTS, _SPLIT_WEIGHTS = 2, 3


@attrs.frozen(kw_only=True)
class Zero:
    """What of a DeepSpeed config decides about memory; counts are of numbers, not of bytes.

    reduce_bucket: of gradients on their way; live_parameters: the most that stage 3 gathers;
    overlap: a second bucket, so that one is filled while the other travels. reduces_in_all: whether
    stage 2 reduces gradients in all processes, of which their owners keep them.
    """

    stage: int
    half: bool
    offload_optimizer: bool
    offload_parameters: bool
    reduce_bucket: int
    live_parameters: int
    overlap: bool
    reduces_in_all: bool

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Zero:
        """Read a whole DeepSpeed config; what it does not set has DeepSpeed's default."""
        zero = config.get("zero_optimization", {})
        stage = int(zero.get("stage", 0))

        def offloads(key: str) -> bool:
            return zero.get(key, {}).get("device", "none") != "none"

        return cls(
            stage=stage,
            half=bool(config.get("bf16", {}).get("enabled", False)),
            offload_optimizer=offloads("offload_optimizer"),
            offload_parameters=offloads("offload_param"),
            reduce_bucket=int(zero.get("reduce_bucket_size", 500_000_000)),
            live_parameters=int(zero.get("stage3_max_live_parameters", 1_000_000_000)),
            overlap=bool(zero.get("overlap_comm", stage == _SPLIT_WEIGHTS)),
            reduces_in_all=bool(zero.get("use_multi_rank_bucket_allreduce", True)),
        )


def check_gathers(sizes: Mapping[str, int], zero: Zero) -> None:
    """Raise RunError for a weight that stage 3 may not gather; sizes: how many numbers, by name.

    An n-gram table is one weight, and each process would hold all of it in each pass.
    """
    for name, size in sizes.items():
        if zero.stage == _SPLIT_WEIGHTS and size > zero.live_parameters:
            raise RunError(
                f"{name}: {size:,} parameters, and ZeRO 3 gathers each weight whole, of which "
                f"stage3_max_live_parameters allows {zero.live_parameters:,}\n"
                "  fix: training_backend.use = 'torch' with strategy = 'fsdp', which exchanges the "
                "rows that are read; or stage = 2; or zero_optimization.stage3_max_live_parameters "
                f"= {size} in [training_backend.config], where there is room for it in each process"
            )


def zero_memory(sizes: Sequence[int], zero: Zero, *, processes: int) -> StateMemory:
    """Bytes of each process for a module whose parameters have ``sizes`` numbers each."""
    if zero.stage == 0:
        return StateMemory(_replicated(sizes, zero, processes))
    device, host = _split(sum(sizes), zero, processes)
    return StateMemory(device, host, torch.bfloat16 if zero.half else None)


def zero_traffic(parameters: int, zero: Zero, *, processes: int, accumulate: int) -> int:
    """Bytes that each process sends in a step, by ring algorithms.

    Stage 0 reduces all gradients once a step. Stage 1 does so too, and gathers the weights that
    others have stepped; stage 2 reduces in each pass, in all processes or each gradient to its
    owner alone. Stage 3 gathers weights in each pass, forward and backward, and reduces gradients.
    """
    size = (2 if zero.half else _FULL) * parameters
    reduce = 2 if zero.reduces_in_all else 1
    times = (2, 2 + 1, reduce * accumulate + 1, 3 * accumulate)[zero.stage]
    return times * size * (processes - 1) // processes


def _replicated(sizes: Sequence[int], zero: Zero, processes: int) -> StateBytes:
    """Stage 0, in float32: gradients are copied into a bucket to travel."""
    parameters = sum(sizes)
    size = _FULL * parameters
    bucket = _FULL * min(parameters, zero.reduce_bucket) if processes > 1 else 0
    return StateBytes(size, size, _MOMENTS * parameters, bucket, size + _WORKSPACE * max(sizes))


def _split(parameters: int, zero: Zero, processes: int) -> tuple[StateBytes, StateBytes]:
    """Stages 1 to 3: what is on the device, and on the host.

    Stages 1 and 2 keep the optimizer's own float32 weights beside the module's in any precision,
    stage 3 beside bfloat16 or offloaded ones only. An offloaded optimizer takes gradients in
    float32, and stages 1 and 2 return its weights through a copy in the module's dtype. The
    optimizer sees its share as one tensor: it steps with a float32 copy of all gradients, for which
    stages 1 and 2 let theirs go, and computes with tensors as large. For scores stage 3 gathers all
    weights, beside its gradients and its bucket, which it never lets go.
    """
    width, share = 2 if zero.half else _FULL, -(-parameters // processes)
    gathers = zero.stage >= _SPLIT_WEIGHTS
    own_weights = not gathers or zero.half or zero.offload_optimizer
    optimizer = (_MOMENTS + (_FULL if own_weights else 0)) * share
    weights = width * (share if gathers else parameters)
    gradients = width * (share if zero.stage >= _SPLIT_GRADIENTS else parameters)
    # Stage 3 has one bucket whatever overlaps.
    buckets = width * zero.reduce_bucket * (2 if zero.overlap and not gathers else 1)
    live = width * min(parameters, zero.live_parameters) if gathers else 0
    step = (_FULL + _WORKSPACE) * share + (gradients if gathers else 0)
    device = StateBytes(weights, gradients, optimizer, buckets + live, step)
    host = StateBytes()
    if zero.offload_optimizer:
        returned = 0 if gathers else width * share
        host = StateBytes(0, _FULL * share, optimizer, returned, (_FULL + _WORKSPACE) * share)
        kept = gradients if zero.stage < _SPLIT_GRADIENTS else 0
        device = attrs.evolve(device, optimizer=0, gradients=kept, step=0)
    if zero.offload_parameters:
        host = attrs.evolve(host, parameters=weights)
        device = attrs.evolve(device, parameters=0)
    if gathers:
        scoring = device.gradients + buckets + width * parameters
        device = attrs.evolve(device, scoring=scoring)
    return device, host
