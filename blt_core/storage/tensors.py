"""What every checkpoint format shares: names of tensors, strict loading, and safe replacement.

A tensor's name is the dotted config path of its component and the parameter's name within it:
``decoder.layers.0.mlp.down.weight``, ``patcher.byte_scorer.head.weight``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import attrs
import torch
from torch import Tensor, nn

from blt_core.errors import CheckpointError
from blt_core.model import Model
from blt_core.protocols import MODEL_KINDS
from blt_core.storage.safetensors import LazyTensors
from blt_core.wiring.config import SCHEMA


def model_config(model: Model) -> dict[str, Any]:
    """The tables that rebuild ``model``: [model] and one for each part, thresholds included.

    A patcher's ``threshold`` is taken from the patcher itself, since it may have been calibrated
    after the model was built.
    """
    scheme = {k: v for k, v in attrs.asdict(model.scheme).items() if v is not None}
    config: dict[str, Any] = {
        "schema": SCHEMA,
        "model": {"context_bytes": model.context_bytes, "ids": scheme},
        **{kind: dict(model.settings[kind]) for kind in MODEL_KINDS if kind in model.settings},
    }
    threshold = getattr(model.patcher, "threshold", None)
    if threshold is not None and "patcher" in config:
        config["patcher"]["threshold"] = float(threshold)
    return config


def model_tensors(model: Model, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """All parameters and buffers by name, on the CPU; floating ones as ``dtype`` if given."""
    state = model.module_dict().state_dict()
    return {name: _stored(tensor, dtype) for name, tensor in state.items()}


def _stored(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    target = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
    return tensor.detach().to("cpu", target).contiguous()


def unshared(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``tensors``, each with memory of its own, which safetensors files ask for.

    A tensor that shares memory with an earlier one, such as a head that is tied to an embedding, is
    copied. So every name is stored, and loading ties again what the model ties.
    """
    found: dict[str, Tensor] = {}
    seen: set[tuple[torch.device, int]] = set()
    for name, tensor in tensors.items():
        memory = (tensor.device, tensor.untyped_storage().data_ptr())
        found[name] = tensor.clone() if tensor.numel() and memory in seen else tensor
        seen.add(memory)
    return found


def load_tensors(modules: nn.ModuleDict, tensors: Mapping[str, Tensor], place: str) -> None:
    """Copy ``tensors`` into the parameters of ``modules``, cast to the dtype these have.

    Nothing is copied unless all fit. Raises CheckpointError that lists every missing, surplus and
    misshapen tensor; ``place`` says where they come from.
    """
    state = modules.state_dict(keep_vars=True)
    _check_fit(state, tensors, place)
    with torch.no_grad():
        for name, own in state.items():
            own.copy_(tensors[name])


def adopt_tensors(
    modules: nn.ModuleDict,
    tensors: Mapping[str, Tensor],
    place: str,
    cast: Callable[[str, Tensor], Tensor],
) -> None:
    """Put ``cast(name, tensor)`` in the place of every parameter and buffer, one at a time.

    What ``cast`` gives back as it is is not copied. Raises as :func:`load_tensors` does.
    """
    state = modules.state_dict(keep_vars=True)
    _check_fit(state, tensors, place)
    adopted: dict[int, Tensor] = {}  # a parameter that two modules share stays one
    for name, own in state.items():
        if id(own) not in adopted:
            stored = tensors[name]
            tensor = cast(name, stored)
            if tensor.data_ptr() != stored.data_ptr() and isinstance(tensors, LazyTensors):
                tensors.release(name)
            adopted[id(own)] = (
                nn.Parameter(tensor, requires_grad=own.requires_grad)
                if isinstance(own, nn.Parameter)
                else tensor
            )
        path, _, leaf = name.rpartition(".")
        setattr(modules.get_submodule(path), leaf, adopted[id(own)])


def _check_fit(state: Mapping[str, Tensor], tensors: Mapping[str, Tensor], place: str) -> None:
    problems = [f"{name}: missing" for name in state if name not in tensors]
    problems += _untied(state, tensors)
    problems += [f"{name}: not a parameter of this model" for name in tensors if name not in state]
    for name, own in state.items():
        found = _shape(tensors, name) if name in tensors else own.shape
        if found != own.shape:
            problems.append(f"{name}: expected {tuple(own.shape)}, found {tuple(found)}")
    if problems:
        lines = "\n".join(f"  {problem}" for problem in problems)
        raise CheckpointError(f"{place}: the tensors do not fit the model of its config:\n{lines}")


def _untied(state: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> Iterator[str]:
    """Tensors that are one in the model, and not in what is to be loaded."""
    first: dict[int, str] = {}
    for name, own in state.items():
        other = first.setdefault(id(own), name)
        if (
            other != name
            and name in tensors
            and other in tensors
            and not torch.equal(tensors[name], tensors[other])
        ):
            yield f"{name}: differs from {other}, to which this model ties it"


def _shape(tensors: Mapping[str, Tensor], name: str) -> tuple[int, ...]:
    return tensors.shape(name) if isinstance(tensors, LazyTensors) else tuple(tensors[name].shape)
