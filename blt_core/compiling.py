"""``[run] compile``: the parts of a model compile their passes of decoding, where they can.

A pass is exported, compiled ahead of time by torch's AOTInductor, and kept as a package in the
user's cache folder, from which later processes load it in milliseconds.
"""

from __future__ import annotations

import atexit
import functools
import hashlib
import importlib.util
import inspect
import os
import shlex
import shutil
import sys
import tempfile
import threading
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs
import torch
from torch import Tensor, nn

from blt_core.capturing import CapturingCompiler, record_on
from blt_core.kernels.machine import machine
from blt_core.log import logger
from blt_core.nn import Compiled, Compiler, Program
from blt_core.storage.user_cache import alone_with, cache_folder, make_private, open_to_others

if TYPE_CHECKING:
    from torch.export import ExportedProgram

#: Where the compiler of torch keeps what it makes on the way.
_KEPT_IN = "TORCHINDUCTOR_CACHE_DIR"
#: Held while one compiles: torch keeps in a variable of the process whether it does.
_COMPILING = threading.Lock()


def compile_passes(module: nn.Module, device: torch.device) -> bool:
    """Have each part compile its passes when they are first asked for; whether any will.

    Parts that can have an attribute ``compiles``, which is set here. What is compiled is kept in
    the user's cache folder, and captured as graphs on CUDA. Where this machine has no compiler, or
    no part can compile, a warning is logged and everything stays as it is.
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
    compiler: Compiler = PassCompiler(_folder(), device)
    if device.type == "cuda":
        compiler = CapturingCompiler(compiler, record_on(device))
    for package in {"blt_core", *(type(part).__module__.partition(".")[0] for part in able)}:
        _source_hash(package)  # as it is now, which is what runs
    for part in able:
        part.compiles = compiler
    return True


def _folder() -> Path:
    """Where programs are kept; a folder of this process alone where the user's cannot be written.

    Both are private, and so are their parents.
    """
    try:
        folder = cache_folder() / "compiled"
        make_private(folder.parent)
        make_private(folder)
        probe = folder / ".own"
        probe.touch(0o600)
        if (other := open_to_others(probe)) is not None:
            raise PermissionError(f"others may write to {other}")
    except (OSError, RuntimeError) as error:  # another user's, or a user without a home
        logger().warning(
            f"compile: what is compiled cannot be kept: {error}",
            fix="XDG_CACHE_HOME=a folder that you may write to",
        )
        own = Path(tempfile.mkdtemp(prefix="blt-core-"))
        atexit.register(shutil.rmtree, own, ignore_errors=True)
        folder = own / "compiled"
        make_private(folder)
    return folder


@attrs.frozen
class PassCompiler:
    """Compiles programs for a device, and keeps them in a private ``folder`` that is there.

    One is for a machine, its torch, and the source.
    """

    folder: Path
    device: torch.device

    def __call__(self, program: Program) -> Compiled:
        """A program that can be called; loaded, where it was compiled before."""
        path = self._path(program)
        if (found := load(path, self.device)) is not None:
            return found
        make_private(self.folder)  # it may have been deleted since
        with _COMPILING, alone_with(path, "compiles this pass"):
            if (found := load(path, self.device)) is not None:
                return found
            logger().info("a pass is compiled", part=program.name)
            os.environ.setdefault(_KEPT_IN, str(self.folder / "torch"))
            with tempfile.TemporaryDirectory(dir=self.folder) as work:
                made = _compiled(program, Path(work) / "pass.pt2")
                made.chmod(0o600)
                made.replace(path)
        found = load(path, self.device)
        if found is None:
            raise RuntimeError(f"{path}: what was just compiled cannot be loaded")
        return found

    def _path(self, program: Program) -> Path:
        here = machine()
        shapes = [
            [str(tensor.dtype), *(axes.get(at, size) for at, size in enumerate(tensor.shape))]
            for tensor, axes in zip(*program.example, strict=True)
        ]
        sources = sorted({"blt_core", *(name.partition(".")[0] for name in program.modules)})
        made_of = (
            *(program.told, shapes, here.cpu, here.flags, here.torch, os.environ.get("CXX")),
            *_accelerator(self.device),
            *map(_source_hash, sources),
        )
        digest = hashlib.sha256(repr(made_of).encode()).hexdigest()[:24]
        return self.folder / f"{program.name}-{digest}.pt2"


def _accelerator(device: torch.device) -> tuple[object, ...]:
    """What a program is compiled for, beside the CPU."""
    if device.type != "cuda":
        return ()
    return torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device)


@functools.cache
def _source_hash(package: str) -> str:
    """A hash of all source of a package: what a function calls may be anywhere in it."""
    digest = hashlib.sha256()
    module = sys.modules[package]
    folders = [Path(each) for each in getattr(module, "__path__", ())]
    files = [path for folder in folders for path in sorted(folder.rglob("*.py"))]
    own = getattr(module, "__file__", None)
    for path in files or ([Path(own)] if own else []):
        digest.update(path.read_bytes())
    if not files and own is None:  # written nowhere: nobody can tell whether it has changed
        digest.update(os.urandom(16))
    return digest.hexdigest()


class _Flat(nn.Module):
    """A program's function as a module, for exporting."""

    def __init__(self, program: Program) -> None:
        super().__init__()
        self._program = program

    def forward(self, *tensors: Tensor) -> Sequence[Tensor]:
        return tuple(self._program.function(*tensors))


def exported(program: Program) -> ExportedProgram:
    """A program as a graph, in which the lengths of open axes are open."""
    from torch.export import Dim, export

    tensors, open_axes = program.example
    dims = {name: Dim(name, min=2) for axes in open_axes for name in axes.values()}
    shapes = tuple({at: dims[name] for at, name in axes.items()} for axes in open_axes)
    # Copies, laid out alike: tensors of inference cannot be traced.
    like = tuple(map(_blank, tensors))
    with torch.no_grad():
        return export(_Flat(program), like, dynamic_shapes={"tensors": shapes}, strict=False)


def _compiled(program: Program, path: Path) -> Path:
    """The package of a program, at ``path``. Raises what the compiler raises."""
    from torch._inductor import aoti_compile_and_package

    with torch.inference_mode(mode=False), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of itself
        return Path(aoti_compile_and_package(exported(program), package_path=str(path)))


def _blank(tensor: Tensor) -> Tensor:
    """One of that layout."""
    if tensor.is_contiguous():  # with the usual strides also where a length is 1
        return torch.zeros(tensor.shape, dtype=tensor.dtype, device=tensor.device)
    return torch.empty_strided(
        tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device
    ).zero_()


def load(path: Path, device: torch.device) -> Compiled | None:
    """A program from its package; None where there is none, or one that is not to be trusted.

    It is code, so it is taken from files and folders alone that nobody else may write to. A file
    that is damaged counts as none.
    """
    try:
        if (other := open_to_others(path)) is not None:
            logger().warning("a compiled pass is not used: others may write to it", path=str(other))
            return None
    except OSError:  # there is none
        return None
    from torch._inductor import aoti_load_package

    index = -1 if device.index is None else device.index
    try:
        model: Any = aoti_load_package(
            str(path),
            # What it does for threads cannot be captured; there its caller has them take turns.
            run_single_threaded=device.type == "cuda",
            device_index=index,
        )
    except (RuntimeError, ValueError, AssertionError, OSError) as error:
        logger().warning("a compiled pass cannot be loaded", path=str(path), reason=str(error))
        return None
    run: Compiled = model.loader.run
    return run


def _missing(device: torch.device) -> str | None:
    """What compiling for ``device`` needs and this machine has not, in words."""
    from torch import _inductor

    loads = getattr(_inductor, "aoti_load_package", None)
    if loads is None or "device_index" not in inspect.signature(loads).parameters:
        return f"torch {torch.__version__} is too old (2.13 was tried)"
    # A compiler for the CPU is needed on other devices too, for what starts their kernels.
    name = os.environ.get("CXX") or "g++"
    if shutil.which(shlex.split(name)[0]) is None:
        return f"this machine has no C++ compiler ({name})"
    if device.type == "cuda" and importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    return None
