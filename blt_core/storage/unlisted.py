"""What a part holds that its ``state_dict`` does not list, and that no checkpoint can store.

A layer in a plain list, or one below an object that is no module, is used by the forward pass, may
even be trained, and is lost when the model is stored. Paths are dotted attributes, as in
``global_model.cells[0].weight``.
"""

from __future__ import annotations

import sys
import types
from collections import deque
from collections.abc import Iterator, Mapping

import attrs
from torch import Tensor, nn

from blt_core.model import Model
from blt_core.protocols import MODEL_KINDS

#: Attributes that every module has; what they hold is walked by its own rules.
_OWN = frozenset(vars(nn.Module()))
#: What holds no tensors of a part.
_LEAVES = (str, bytes, int, float, complex, type, types.ModuleType, types.FunctionType)


@attrs.frozen
class Unlisted:
    """What ``state_dict`` leaves out.

    weights: modules with parameters or stored buffers, and tensors that are trained, by their path:
    they would be lost. computed: other tensors by path (buffers that are not stored, plain
    attributes), which have to come out the same whenever the part is built.
    """

    weights: Mapping[str, nn.Module | Tensor]
    computed: Mapping[str, Tensor]


def unlisted(model: Model) -> Unlisted:
    """What the parts of a model hold beside their ``state_dict``."""
    state = model.module_dict().state_dict(keep_vars=True)
    walk = _Walk({id(tensor) for tensor in state.values()})
    for kind in MODEL_KINDS:
        walk.enter(kind, getattr(model, kind), registered=True)
    return Unlisted(walk.weights, walk.computed)


class _Walk:
    """Follows attributes and containers; each object is met once."""

    def __init__(self, listed: set[int]) -> None:
        self.weights: dict[str, nn.Module | Tensor] = {}
        self.computed: dict[str, Tensor] = {}
        self._listed = listed
        self._met: dict[int, object] = {}  # keeps what it has met, so that no id comes back

    def enter(self, path: str, value: object, *, registered: bool = False) -> None:
        """Look at ``value``; registered: its holder is known to list it, or is a part itself."""
        if value is None or isinstance(value, _LEAVES) or id(value) in self._met:
            return
        self._met[id(value)] = value
        if isinstance(value, Tensor):
            self._tensor(path, value)
        elif isinstance(value, nn.Module) and not registered and self._lost(value):
            self.weights[path] = value
        else:
            for below, item, known in _held(path, value):
                self.enter(below, item, registered=known)

    def _tensor(self, path: str, tensor: Tensor) -> None:
        if id(tensor) in self._listed:
            return
        if isinstance(tensor, nn.Parameter) or (tensor.requires_grad and tensor.is_leaf):
            self.weights[path] = tensor
        else:
            self.computed[path] = tensor

    def _lost(self, module: nn.Module) -> bool:
        """Whether it holds what would be stored if it were registered."""
        held = module.state_dict(keep_vars=True).values()
        return any(id(tensor) not in self._listed for tensor in held)


def _held(path: str, value: object) -> Iterator[tuple[str, object, bool]]:
    """(path, object, whether a module registers it) of all that an object holds."""
    if isinstance(value, nn.Module):
        for name, child in value.named_children():
            yield f"{path}.{name}", child, True
        for name, buffer in value.named_buffers(recurse=False):
            yield f"{path}.{name}", buffer, True
    if isinstance(value, Mapping):
        yield from ((f"{path}[{key!r}]", item, False) for key, item in value.items())
    elif isinstance(value, (list, tuple, set, frozenset, deque)):
        yield from ((f"{path}[{place}]", item, False) for place, item in enumerate(value))
    elif isinstance(value, (nn.Module, types.SimpleNamespace)) or not _is_foreign(type(value)):
        yield from ((f"{path}.{name}", item, False) for name, item in _attributes(value).items())


def _is_foreign(kind: type) -> bool:
    """Whether a class is Python's, torch's or numpy's: such objects hold no part's layers."""
    package = kind.__module__.partition(".")[0]
    return package in {"torch", "numpy"} or package in sys.stdlib_module_names


def _attributes(value: object) -> dict[str, object]:
    """The attributes of an object that are its own."""
    found = dict(getattr(value, "__dict__", {}))
    if isinstance(value, nn.Module):
        return {name: item for name, item in found.items() if name not in _OWN}
    for kind in type(value).__mro__:
        slots = vars(kind).get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            if name != "__weakref__" and hasattr(value, name):
                found[name] = getattr(value, name)
    return found
