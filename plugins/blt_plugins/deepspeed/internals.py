"""All that is used of DeepSpeed beyond its documented interface.

Each part has a name of ours, what it is needed for, and what it has to be. :func:`check_package`
and :func:`check_engine` go through all of them before the first step, so that another version of
DeepSpeed is an error that names the part, in place of an AttributeError in the middle of a run. The
rest of this plugin uses what DeepSpeed documents, and the functions below.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import inspect
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

import attrs
import torch
from torch import Tensor, nn

from blt_core.errors import PluginError
from blt_plugins.deepspeed.versions import FIX, installed

_STAGES = frozenset(range(4))
_SPLIT_WEIGHTS = 3


@attrs.frozen
class Internal:
    """One part of DeepSpeed that it does not document.

    path: where it is, as Python spells it, on ``deepspeed`` the package, on ``engine``, which
    ``initialize`` returns, or on ``parameter``, one of the engine's module. needed_for: what of
    this plugin would not work without. expected: what it has to be, in words; fits: whether a value
    is that. stages: of ZeRO that use it. only_cpu: whether other devices do without.
    """

    path: str
    needed_for: str
    expected: str
    fits: Callable[[Any], bool]
    stages: frozenset[int] = _STAGES
    only_cpu: bool = False

    @property
    def owner(self) -> str:
        """What it is looked up on: ``deepspeed``, ``engine`` or ``parameter``."""
        return self.path.split(".", 1)[0]

    def of(self, owner: Any) -> Any:
        """Its value; raises PluginError where it is missing or is something else."""
        if problem := self.problem(owner):
            raise _refusal([problem])
        return self._find(owner)

    def problem(self, owner: Any) -> str:
        """What is wrong with it, and what it is needed for; empty if nothing is."""
        try:
            found = self._find(owner)
        except (AttributeError, ImportError):
            return self._told("is missing")
        if not self.fits(found):
            return self._told(f"is {_show(found)}, not {self.expected}")
        return ""

    def _find(self, owner: Any) -> Any:
        found = owner
        for name in self.path.split(".")[1:]:
            if isinstance(found, ModuleType) and not hasattr(found, name):
                importlib.import_module(f"{found.__name__}.{name}")
            found = getattr(found, name)
        return found

    def _told(self, what: str) -> str:
        return f"{self.path} {what}; it is needed {self.needed_for}"


def _refusal(problems: Iterable[str]) -> PluginError:
    return PluginError(
        f"the training backend 'deepspeed' cannot use DeepSpeed {installed()}",
        [*problems, FIX],
    )


def _show(value: object) -> str:
    shown = repr(value)
    return f"{shown if len(shown) < 40 else type(value).__name__}"  # noqa: PLR2004 -- characters


def _takes(count: int) -> Callable[[Any], bool]:
    """Whether a value can be called with so many arguments."""

    def fits(value: Any) -> bool:
        if not callable(value):
            return False
        try:
            inspect.signature(value).bind(*range(count))
        except (TypeError, ValueError):
            return False
        return True

    return fits


def _is(kind: type) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, kind)


def _is_handle(value: Any) -> bool:
    return callable(getattr(value, "remove", None))


def _are_handles(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(map(_is_handle, value))


#: Options of the converter beside its two folders.
_OPTIONS: Mapping[str, Any] = {
    "num_extract_workers": 1,  # more would be forked from this process
    "num_merge_workers": 1,
    "keep_temp_folder": False,
    "strict": True,
    "inject_missing_state": True,
}


def _reads_known_options(value: Any) -> bool:
    """Whether a converter takes its options in one object, and reads none that it is not given."""
    if not _takes(1)(value):
        return False
    read = re.findall(r"\bargs\.(\w+)", inspect.getsource(inspect.getmodule(value) or value))
    return set(read) <= {"input_folder", "output_folder", *_OPTIONS}


_SPLIT = frozenset({_SPLIT_WEIGHTS})
COMPATIBLE_OPS = Internal(
    "deepspeed.ops.__compatible_ops__",
    "to join a process group on the CPU without compiling an op, which training does not use",
    "a dict with deepspeed_shm_comm",
    lambda value: isinstance(value, dict) and "deepspeed_shm_comm" in value,
    only_cpu=True,
)
TORCH_COMM = Internal(
    "deepspeed.comm.TorchBackend",
    "to free its methods of the process group that was there when they were imported",
    "a class",
    _is(type),
)
DESTROY_GROUP = Internal(
    "deepspeed.comm.destroy_process_group",
    "to leave the process group at the end of a run",
    "a function without arguments",
    _takes(0),
)
COMM_BACKEND = Internal(
    "deepspeed.comm.comm.cdb",
    "to have the next run in this process make a process group of its own",
    "None or a backend",
    lambda value: value is None or hasattr(value, "is_initialized"),
)
CONVERTER = Internal(
    "deepspeed.checkpoint.ds_to_universal.main",
    "to go on from a state in another number of processes",
    f"a function of one object with the options {', '.join(_OPTIONS)}",
    _reads_known_options,
)
LOADS_UNIVERSAL = Internal(
    "engine._config.load_universal_checkpoint",
    "to read a converted state; in the config it would be on for good, and states lack files then",
    "a bool",
    _is(bool),
)
GRADIENT_NORM = Internal(
    "engine.get_global_grad_norm",
    "to log the norm of the gradients and to stop where it is no number",
    "a function without arguments",
    _takes(0),
    frozenset({1, 2, 3}),
)
DESTROY = Internal(
    "engine.destroy",
    "to let go of an engine and its hooks",
    "a function without arguments",
    _takes(0),
)
PRE_FORWARD_HOOK = Internal(
    "engine.module_forward_pre_hook",
    "to take the engine out of a module that is used without it",
    "a hook's handle",
    _is_handle,
)
POST_FORWARD_HOOK = Internal(
    "engine.module_forward_post_hook",
    "to take the engine out of a module that is used without it",
    "a hook's handle",
    _is_handle,
)
EMPTY_CACHE = Internal(
    "engine.empty_partition_cache",
    "to let go of weights that are gathered ahead, before all are gathered for scores",
    "a function without arguments",
    _takes(0),
    _SPLIT,
)
FORWARD_HOOKS = Internal(
    "engine.optimizer.parameter_offload.forward_hooks",
    "to call parts for scores without the hooks, which need the same calls in every process",
    "a list of hooks' handles",
    _are_handles,
    _SPLIT,
)
BACKWARD_HOOKS = Internal(
    "engine.optimizer.parameter_offload.backward_hooks",
    "to call parts for scores without the hooks, which need the same calls in every process",
    "a list of hooks' handles",
    _are_handles,
    _SPLIT,
)
REGISTER_HOOKS = Internal(
    "engine.optimizer.parameter_offload._register_deepspeed_module",
    "to put the hooks back after scores",
    "a function of a module",
    _takes(1),
    _SPLIT,
)
PARAMETER_ID = Internal(
    "parameter.ds_id",
    "to tell parameters that are spread from others",
    "an int",
    _is(int),
    _SPLIT,
)
PARAMETER_SHAPE = Internal(
    "parameter.ds_shape",
    "to give gathered float32 weights their shape",
    "a torch.Size",
    _is(torch.Size),
    _SPLIT,
)
PARAMETER_SIZE = Internal(
    "parameter.ds_numel",
    "to see whether a parameter is whole at the moment",
    "an int",
    _is(int),
    _SPLIT,
)

#: All of them; what is not here is documented by DeepSpeed, or not used.
INTERNALS = tuple(each for each in globals().copy().values() if isinstance(each, Internal))


# -- at the start ----------------------------------------------------------------------------------


def check_package(deepspeed: ModuleType, device: torch.device) -> None:
    """Raise PluginError where parts of the package are not as expected; it names them all."""
    used = [each for each in INTERNALS if device.type == "cpu" or not each.only_cpu]
    _check(used, {"deepspeed": [deepspeed]})


def check_engine(engine: Any, module: nn.Module, stage: int) -> None:
    """The same for a new engine of a ZeRO stage and the parameters of its module."""
    used = [each for each in INTERNALS if stage in each.stages]
    _check(used, {"engine": [engine], "parameter": list(module.parameters())})


def _check(internals: Iterable[Internal], owners: Mapping[str, Sequence[Any]]) -> None:
    found = (each.problem(owner) for each in internals for owner in owners.get(each.owner, ()))
    # Each once, though all parameters may lack it.
    if problems := list(dict.fromkeys(filter(None, found))):
        raise _refusal(problems)


# -- the package and its process group -------------------------------------------------------------


def spare_compilation(deepspeed: ModuleType) -> None:
    """Have joining a group on the CPU compile nothing; call it before that."""
    COMPATIBLE_OPS.of(deepspeed)["deepspeed_shm_comm"] = False


def forget_default_groups(deepspeed: ModuleType) -> None:
    """Have methods whose default argument is the group of their import use the one that is there.

    A scorer may have been trained before, in a group that would be kept until the process ends.
    """
    for method in vars(TORCH_COMM.of(deepspeed)).values():
        defaults = method.__defaults__ if isinstance(method, FunctionType) else None
        if defaults and any(map(_is_group, defaults)):
            method.__defaults__ = tuple(None if _is_group(each) else each for each in defaults)


def destroy_group(deepspeed: ModuleType) -> None:
    """End the process group, if there is one, and cut it from whatever DeepSpeed leaves behind."""
    if torch.distributed.is_initialized():
        DESTROY_GROUP.of(deepspeed)()
    COMM_BACKEND.of(deepspeed)
    deepspeed.comm.comm.cdb = None  # it would be taken for the next run's
    _forget_groups()


def _is_group(value: object) -> bool:
    return isinstance(value, torch.distributed.ProcessGroup)


def _forget_groups() -> None:
    """Take process groups out of DeepSpeed's objects, and of parameters that it has marked.

    A destroyed engine lives on in cycles through autograd's hooks, which the garbage collector does
    not see. Its groups would keep their threads running into the end of the interpreter.
    """
    for each in gc.get_objects():
        if str(type(each).__module__).startswith("deepspeed.") or isinstance(each, nn.Parameter):
            for name, value in list(getattr(each, "__dict__", {}).items()):
                if _is_group(value) or (isinstance(value, list) and any(map(_is_group, value))):
                    setattr(each, name, None)


# -- states ----------------------------------------------------------------------------------------


def convert_to_universal(folder: Path, output: Path) -> None:
    """Write the state in ``folder`` to ``output``, in the universal format.

    Raises whatever DeepSpeed raises for files that are missing or damaged.
    """
    import deepspeed

    folders = {"input_folder": str(folder), "output_folder": str(output)}
    CONVERTER.of(deepspeed)(argparse.Namespace(**folders, **_OPTIONS))


@contextmanager
def loading_universal(engine: Any) -> Iterator[None]:
    """Within it the engine loads states in the universal format.

    For the time of a load alone: an engine made with it writes states that lack files.
    """
    LOADS_UNIVERSAL.of(engine)
    config = engine._config  # noqa: SLF001 -- DeepSpeed's, as all of this file
    config.load_universal_checkpoint = True
    try:
        yield
    finally:
        config.load_universal_checkpoint = False


# -- engines and their modules ---------------------------------------------------------------------


def gradient_norm(engine: Any) -> float:
    """The norm of the last step's gradients before clipping, stages 1 to 3; -1 for no number."""
    return float(GRADIENT_NORM.of(engine)())


def destroy(engine: Any) -> None:
    """End an engine; the weights of its module are not gathered."""
    DESTROY.of(engine)()


def take_out(engine: Any) -> None:
    """End an engine and remove its hooks from its module, whose weights are not gathered."""
    for hook in (PRE_FORWARD_HOOK, POST_FORWARD_HOOK):
        hook.of(engine).remove()
    destroy(engine)


@contextmanager
def without_layer_hooks(engine: Any, module: nn.Module) -> Iterator[None]:
    """Within it, at stage 3, calls of the module's parts neither gather nor drop weights.

    The hooks require identical calls on every rank and would record evaluation's call order. They
    are re-registered afterwards, and record the order of training again.
    """
    register = REGISTER_HOOKS.of(engine)
    EMPTY_CACHE.of(engine)()
    for hook in (*FORWARD_HOOKS.of(engine), *BACKWARD_HOOKS.of(engine)):
        hook.remove()
    offload = engine.optimizer.parameter_offload
    offload.forward_hooks, offload.backward_hooks = [], []
    try:
        yield
    finally:
        register(module)


def is_apart(tensor: Tensor) -> bool:
    """Whether a tensor is a parameter of stage 3 of which this process has only a part."""
    return _is_spread(tensor) and tensor.numel() != PARAMETER_SIZE.of(tensor)


def full_shape(tensor: Tensor) -> torch.Size:
    """The shape of a parameter or buffer, also where this process has only a part of it."""
    shape: torch.Size = PARAMETER_SHAPE.of(tensor) if _is_spread(tensor) else tensor.shape
    return shape


def _is_spread(tensor: Tensor) -> bool:
    return not PARAMETER_ID.problem(tensor)


def set_parameters(module: nn.Module, plain: Mapping[int, nn.Parameter]) -> None:
    """Give a module other parameters, by the ids of its own; call it once its engine is gone.

    Stage 3 has put dicts of its own in place of the modules', which are replaced too.
    """
    for part in module.modules():
        held = part._parameters.items()  # noqa: SLF001 -- torch's, which DeepSpeed has replaced
        own = {key: p if p is None else plain[id(p)] for key, p in held}
        part._parameters = own  # noqa: SLF001
