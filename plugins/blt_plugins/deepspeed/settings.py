"""The backend's keys, and the config that DeepSpeed is given for them."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, Literal

import attrs

from blt_core.component import between

Offload = Literal["none", "cpu"]

#: What a table of DeepSpeed's config may hold: tables in tables, as deep as its documentation goes.
Scalar = bool | int | float | str
Value = Scalar | list[Scalar]
Inner = Mapping[str, Value]
Middle = Mapping[str, Value | Inner]
Outer = Mapping[str, Value | Middle]
Raw = Mapping[str, Value | Outer]

#: Keys of DeepSpeed's config that follow from others here, and what to set instead.
OWNED: Mapping[tuple[str, ...], str] = {
    ("train_batch_size",): "[train] batch_bytes",
    ("train_micro_batch_size_per_gpu",): "[train] batch_bytes",
    ("gradient_accumulation_steps",): "[train] accumulate",
    ("gradient_clipping",): "[train] clip",
    ("optimizer",): "[train] weight_decay (the optimizer is AdamW)",
    ("scheduler",): "[train] learning_rate and schedule",
    (
        "fp16",
    ): "weight_dtype = 'bfloat16' (float16 skips steps, which the loop takes for a failure)",
    ("bf16", "enabled"): "weight_dtype",
    ("zero_optimization", "stage"): "stage",
    ("checkpoint", "load_universal"): "nothing (states are converted where it is needed)",
}


def _check_raw(_: object, __: attrs.Attribute[Any], config: Raw) -> None:
    for path, instead in OWNED.items():
        found: object = config
        for key in path:
            found = found.get(key) if isinstance(found, Mapping) else None
        if found is not None:
            raise ValueError(f"{'.'.join(path)} is not set here; set {instead} instead")


@attrs.frozen(kw_only=True)
class DeepSpeedBackendParams:
    """stage: of ZeRO; what is split over the processes.

    0 nothing, 1 the optimizer's state, 2 gradients too, 3 weights too. offload_optimizer,
    offload_parameters: keep them in the memory of the CPU. weight_dtype: of the weights that
    passes use, and of gradients; beside bfloat16 ones the optimizer keeps its own in float32.
    config: further keys of DeepSpeed's config, as in its documentation; they come last.
    """

    stage: int = attrs.field(default=1, validator=between(0, 3))
    offload_optimizer: Offload = "none"
    offload_parameters: Offload = "none"
    weight_dtype: Literal["float32", "bfloat16"] = "float32"
    config: Raw = attrs.field(factory=dict, validator=_check_raw)

    def __attrs_post_init__(self) -> None:
        if self.weight_dtype == "bfloat16" and self.stage == 0:
            raise ValueError("weight_dtype 'bfloat16' needs stage 1 to 3; set stage = 1")
        if self.offload_optimizer != "none" and self.stage == 0:
            raise ValueError("offload_optimizer needs stage 1 to 3; set stage = 1")
        if self.offload_parameters != "none" and self.stage != 3:  # noqa: PLR2004 -- the stage
            raise ValueError("offload_parameters needs stage = 3")


def deepspeed_config(
    params: DeepSpeedBackendParams, *, clip: float, accumulate: int, world_size: int
) -> dict[str, Any]:
    """The whole config; ``clip`` 0 leaves clipping to the caller.

    DeepSpeed counts samples, which are passes here: a micro-batch is one.
    """
    zero: dict[str, Any] = {"stage": params.stage}
    for key, device in (
        ("offload_optimizer", params.offload_optimizer),
        ("offload_param", params.offload_parameters),
    ):
        if device != "none":
            zero[key] = {"device": device}
    generated: dict[str, Any] = {
        "train_batch_size": accumulate * world_size,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": accumulate,
        "gradient_clipping": clip,
        "zero_optimization": zero,
        # Its own Adam for offloading is compiled where it runs; torch's is good anywhere.
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 1_000_000_000,
    }
    if params.weight_dtype == "bfloat16":
        generated["bf16"] = {"enabled": True}
    return _merged(generated, params.config)


def _merged(table: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """``table`` with the keys of ``over``, which win; tables are merged key by key."""
    merged = dict(table)
    for key, value in over.items():
        held = merged.get(key)
        both = isinstance(held, Mapping) and isinstance(value, Mapping)
        merged[key] = _merged(held, value) if both else copy.deepcopy(value)
    return merged
