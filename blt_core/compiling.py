"""``[run] compile``: the parts of a model compile their passes of decoding, where they can."""

from __future__ import annotations

import importlib.util
import os
import shlex
import shutil
from typing import Any

import torch
from torch import nn

from blt_core.log import logger
from blt_core.storage.user_cache import cache_folder

#: Where the compiler of torch keeps what it has made.
_KEPT_IN = "TORCHINDUCTOR_CACHE_DIR"


def compile_passes(module: nn.Module, device: torch.device) -> bool:
    """Have each part compile its passes when they are first asked for; whether any will.

    Parts that can have an attribute ``compiles``, which is set here. What is compiled is kept in
    the user's cache folder, unless TORCHINDUCTOR_CACHE_DIR names another. Where this machine has no
    compiler, or no part can compile, a warning is logged and everything stays as it is.
    """
    missing = _missing(device)
    if missing is not None:
        logger().warning(
            f"compile: {missing}; passes run uncompiled",
            fix="install what is missing, or leave compile out",
        )
        return False
    able: list[Any] = [part for part in module.modules() if hasattr(part, "compiles")]
    if not able:
        logger().warning("compile: no part of this model can compile its passes")
        return False
    os.environ.setdefault(_KEPT_IN, str(cache_folder() / "compiled"))
    for part in able:
        part.compiles = True
    return True


def _missing(device: torch.device) -> str | None:
    """What compiling for ``device`` needs and this machine has not, in words."""
    if not hasattr(torch.compiler, "keep_tensor_guards_unsafe"):
        return f"torch {torch.__version__} is too old (2.13 was tried)"
    # A compiler for the CPU is needed on other devices too, for what starts their kernels.
    name = os.environ.get("CXX") or "g++"
    if shutil.which(shlex.split(name)[0]) is None:
        return f"this machine has no C++ compiler ({name})"
    if device.type == "cuda" and importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    return None
