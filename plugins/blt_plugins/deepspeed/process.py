"""DeepSpeed as a package: whether it is there, its import, and its process group."""

from __future__ import annotations

import gc
import importlib.util
import os
import warnings
from importlib import metadata
from types import FunctionType, ModuleType
from typing import Any

import torch
from torch import nn

from blt_core.errors import PluginError

#: The one version whose behaviour, parts that it does not document included, is tested.
VERSION = "0.19.8"


def check_installed() -> None:
    """Raise PluginError unless DeepSpeed is installed in the version that this is written for."""
    if importlib.util.find_spec("deepspeed") is None:
        found = "it is not installed"
    elif (version := metadata.version("deepspeed")) != VERSION:
        found = f"{version} is installed"
    else:
        return
    raise PluginError(
        f"the training backend 'deepspeed' needs DeepSpeed {VERSION}; {found}",
        ["fix: pip install 'blt-core[deepspeed]'"],
    )


def import_deepspeed(device: torch.device) -> ModuleType:
    """The package, set to train on ``device``: the first import in a process decides."""
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed
    import deepspeed.ops

    _forget_default_groups(deepspeed.comm.TorchBackend)
    # Its calls, not ours: one line for each call would bury what a run has to say.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    if device.type == "cpu":
        # Joining a group would compile this op, which training does not use, for a minute.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def join_group(deepspeed: ModuleType, device: torch.device) -> None:
    """Enter the process group of the launcher; without one, a group of this process alone."""
    # Imported later, its functions would keep the group: they have it as a default argument.
    import torch.distributed.nn

    where: dict[str, Any] = {}
    if "WORLD_SIZE" not in os.environ and not torch.distributed.is_initialized():
        os.environ.setdefault("LOCAL_RANK", "0")
        where = {"init_method": "tcp://127.0.0.1:0", "rank": 0, "world_size": 1}
    deepspeed.init_distributed(
        "nccl" if device.type == "cuda" else "gloo",
        auto_mpi_discovery=False,  # would import mpi4py
        verbose=False,
        **where,
    )


def leave_group(deepspeed: ModuleType) -> None:
    """Let the process group go, so that a later run in this process can make one of its own."""
    if torch.distributed.is_initialized():
        deepspeed.comm.destroy_process_group()
    deepspeed.comm.comm.cdb = None  # it would be taken for the next run's
    _forget_groups()


def _forget_default_groups(backend: type) -> None:
    """Have methods whose default argument is the group of their import use the one that is there.

    A scorer may have been trained before, in a group that would be kept until the process ends.
    """
    for method in vars(backend).values():
        defaults = method.__defaults__ if isinstance(method, FunctionType) else None
        if defaults and any(map(_is_group, defaults)):
            method.__defaults__ = tuple(None if _is_group(each) else each for each in defaults)


def _is_group(value: object) -> bool:
    return isinstance(value, torch.distributed.ProcessGroup)


def _forget_groups() -> None:
    """Cut the process groups from what DeepSpeed leaves behind.

    A destroyed engine lives on in cycles through autograd's hooks, which the garbage collector does
    not see. Its groups would keep their threads running into the end of the interpreter.
    """
    for each in gc.get_objects():
        if str(type(each).__module__).startswith("deepspeed.") or isinstance(each, nn.Parameter):
            for name, value in list(getattr(each, "__dict__", {}).items()):
                if _is_group(value) or (isinstance(value, list) and any(map(_is_group, value))):
                    setattr(each, name, None)
