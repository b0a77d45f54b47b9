"""The parameters of a module: which decay, what they weigh, which layers are gathered."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn

from blt_core.nn import RowTable


def gathered_layers(module: nn.Module) -> Iterator[nn.Module]:
    """The layers that are gathered one at a time: those in lists that are called as modules."""
    for child in module.modules():
        for layer in child if isinstance(child, nn.ModuleList) else ():
            if type(layer).forward is not nn.Module.forward:
                yield layer


def spreadable_tables(module: nn.Module) -> list[RowTable]:
    """The tables whose rows may stay apart: those that alone hold their weight."""
    uses = Counter(
        id(parameter) for part in module.modules() for parameter in part.parameters(recurse=False)
    )
    tables = [part for part in module.modules() if isinstance(part, RowTable)]
    return [table for table in tables if uses[id(table.weight)] == 1]


def unit_bytes(module: nn.Module) -> tuple[int, list[int], int]:
    """Bytes of the root, of each layer, and of tables, which are parts of neither."""
    tables = {table.weight for table in spreadable_tables(module)}

    def of(part: nn.Module) -> int:
        return parameter_bytes(each for each in part.parameters() if each not in tables)

    layers = [of(layer) for layer in gathered_layers(module)]
    return of(module) - sum(layers), layers, parameter_bytes(tables)


def parameter_bytes(parameters: Iterable[nn.Parameter]) -> int:
    """Their bytes."""
    return sum(p.numel() * p.element_size() for p in parameters)


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two optimizer groups: matrices of linear layers, which decay, and all the rest.

    A group's ``matrices`` says which it is.
    """
    matrices = {id(layer.weight) for layer in module.modules() if isinstance(layer, nn.Linear)}
    decay = [p for p in module.parameters() if id(p) in matrices]
    plain = [p for p in module.parameters() if id(p) not in matrices]
    groups = [
        {"params": decay, "weight_decay": weight_decay, "matrices": True},
        {"params": plain, "weight_decay": 0.0, "matrices": False},
    ]
    return [group for group in groups if group["params"]]
