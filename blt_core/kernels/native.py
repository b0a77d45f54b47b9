"""The native product: a loop in C++, compiled once for this machine, into the user's cache folder.

Nothing needs it. ``blt bench-kernels --build`` compiles it; where that was done it is a candidate.
"""

from __future__ import annotations

import functools
import hashlib
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from blt_core.errors import RunError
from blt_core.kernels.machine import machine
from blt_core.log import logger
from blt_core.storage.user_cache import cache_folder, make_private, open_to_others

#: The loop, and the operator of torch that calls it.
SOURCES = tuple(Path(__file__).with_name(name) for name in ("native.cpp", "operator.cpp"))
#: Contraction is off: where two roundings become one is said in the source.
FLAGS = ("-O3", "-march=native", "-fopenmp", "-ffp-contract=off", "-Wno-psabi")
_NAME = "blt_product"
#: Lines of a compiler's message that are shown.
_SHOWN = 12

#: The product of rows (…, k) and a contiguous weight (n, k), both of bfloat16 or of float32, on a
#: CPU: (…, n). Raises ValueError for others.
Product = Callable[[Tensor, Tensor], Tensor]

_OPERATORS = torch.library.Library("blt_core", "FRAGMENT")
_OPERATORS.define("product(Tensor x, Tensor weight) -> Tensor")


def _blank_product(x: Tensor, weight: Tensor) -> Tensor:
    """What compilers know of the operator; the library brings what computes it."""
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


torch.library.register_fake("blt_core::product", _blank_product, lib=_OPERATORS)


@functools.cache
def source_hash() -> str:
    """A name for the sources and their flags."""
    sources = b"".join(path.read_bytes() for path in SOURCES)
    return hashlib.sha256(sources + repr(FLAGS).encode()).hexdigest()[:16]


def library() -> Path:
    """Where the compiled loop of this machine lies, or would lie."""
    here = machine()
    name = hashlib.sha256(f"{source_hash()} {here.cpu} {here.flags} {here.torch}".encode())
    return cache_folder() / "kernels" / f"native-{name.hexdigest()[:16]}.so"


def native_hash() -> str | None:
    """The hash of the source, where its library is there; else None."""
    return source_hash() if load() is not None else None


def load() -> Product | None:
    """The compiled loop; None where it is not built, or cannot be loaded.

    It is code, so it is taken from files and folders alone that nobody else may write to.
    """
    try:
        path = library()
        if not path.exists():
            return None
        if (other := open_to_others(path)) is not None:
            logger().warning(
                "the native kernel is not used: others may write to it", path=str(other)
            )
            return None
    except (OSError, RuntimeError):  # another user's folder; a user without a home
        return None
    return _loaded(path)


@functools.cache
def _loaded(path: Path) -> Product | None:
    try:
        torch.ops.load_library(path)
    except OSError:  # of another system, say; ``build`` makes another
        return None
    product: Product = torch.ops.blt_core.product.default
    return product


def build() -> Path:
    """Compile the loop for this machine, and give where it lies. Takes some twenty seconds.

    Raises RunError where no compiler is there, or it fails.
    """
    from torch.utils import cpp_extension

    _find_tools(cpp_extension.get_cxx_compiler())
    path = library()
    make_private(path.parent.parent)
    make_private(path.parent)
    with tempfile.TemporaryDirectory(dir=path.parent) as work:
        try:
            cpp_extension.load(
                _NAME,
                [*map(str, SOURCES)],
                extra_cflags=list(FLAGS),
                build_directory=work,
                is_python_module=False,
            )
        except (RuntimeError, OSError, subprocess.CalledProcessError) as error:
            lines = "\n  ".join(str(error).splitlines()[:_SHOWN])
            raise RunError(
                f"the native kernel cannot be compiled: {lines}\n"
                "  fix: another compiler (CXX=…), or none: kernels of torch serve without it"
            ) from error
        made = next(Path(work).glob(f"{_NAME}*.so"))
        made.chmod(0o700)
        with made.open("rb") as file:  # a half of it would end a process that loads it
            os.fsync(file.fileno())
        made.replace(path)
    _loaded.cache_clear()
    return path


def _find_tools(compiler: str) -> None:
    """Raise RunError unless there is what compiles C++ extensions of torch."""
    without = "or go on without it: kernels of torch serve everywhere"
    if sys.platform == "win32":
        raise RunError(f"the native kernel is compiled by g++, not on Windows\n  fix: {without}")
    if shutil.which(shlex.split(compiler)[0]) is None:
        raise RunError(
            f"no C++ compiler: {compiler!r} was not found\n"
            f"  fix: install g++, or name it in CXX; {without}"
        )
    if shutil.which("ninja") is None:
        raise RunError(
            "no build tool: 'ninja', which torch compiles with, was not found\n"
            f"  fix: pip install ninja; {without}"
        )
