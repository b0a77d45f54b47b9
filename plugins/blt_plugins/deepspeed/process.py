"""DeepSpeed as a package: its import, and its process group."""

from __future__ import annotations

import os
import warnings
from types import ModuleType
from typing import Any

import torch

from blt_core.errors import PluginError
from blt_plugins.deepspeed import internals
from blt_plugins.deepspeed.versions import FIX, installed, warn_untested


def import_deepspeed(device: torch.device) -> ModuleType:
    """The package, set to train on ``device``: the first import in a process decides.

    Raises PluginError where it lacks something that is used here, or cannot be imported at all.
    """
    warn_untested()
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    try:
        import deepspeed
    except Exception as error:  # whatever a version does not find in this torch or Python
        raise PluginError(
            f"DeepSpeed {installed()} cannot be imported with torch {torch.__version__}: "
            f"{type(error).__name__}: {error}",
            [FIX],
        ) from error

    internals.check_package(deepspeed, device)
    internals.forget_default_groups(deepspeed)
    # Its calls, not ours: one line for each call would bury what a run has to say.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    if device.type == "cpu":
        internals.spare_compilation(deepspeed)
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
    internals.destroy_group(deepspeed)
