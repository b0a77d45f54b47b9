"""What every checkpoint format shares: names of tensors, strict loading, and safe replacement.

A tensor's name is the dotted config path of its component and the parameter's name within it:
``decoder.layers.0.mlp.down.weight``, ``patcher.byte_scorer.head.weight``.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import attrs
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from blt_core.errors import BltError, CheckpointError, DataError, RunError
from blt_core.files import names_in
from blt_core.model import Model
from blt_core.storage.safetensors import LazyTensors
from blt_core.wiring.config import MODEL_KINDS, SCHEMA

#: What a checkpoint folder holds; a folder without one of them is none, and is never replaced.
MODEL_FILES = CONFIG, TENSORS = ("config.toml", "model.safetensors")


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
    state = model.modules().state_dict()
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


@contextlib.contextmanager
def replace_folder(
    target: Path, files: Collection[str], marks: Collection[str] | None = None
) -> Iterator[Path]:
    """A temporary sibling folder that takes the place of ``target`` if the block succeeds.

    files: the names that the block writes. marks: those that a folder must hold to be replaced, and
    that go with it (default: files). What else lies in the old folder is kept. At every moment the
    old or the new content is complete on the disk: where the name itself is missing for an instant,
    :func:`current_folder` finds the old content under its spare name. Raises DataError
    as :func:`check_replaceable` does, RunError if a file cannot be written.
    """
    marks = files if marks is None else marks
    check_replaceable(target, marks)
    target = _real(target)
    fresh = _temporary(target)
    with file_errors(target, RunError):
        try:
            fresh.mkdir(parents=True)
            yield fresh
            # Some writers keep files to the user alone; the folder's mode is what was asked for.
            mode = fresh.stat().st_mode & 0o666
            for path in fresh.iterdir():
                path.chmod(mode)
            _carry(current_folder(target), fresh, {*files, *marks})
            flush_all(fresh)
            _swap(fresh, target)
        except BaseException:
            shutil.rmtree(fresh, ignore_errors=True)
            raise


def check_replaceable(target: Path, files: Collection[str]) -> None:
    """Raise DataError if something has the name ``target`` that :func:`replace_folder` must leave.

    It replaces a folder that holds all of ``files``, or nothing but what systems and editors leave.
    """
    real = _real(target)
    for found in (real, _spare(real)):
        with file_errors(found, DataError):
            names = names_in(found)
        if names and not names.issuperset(files):
            raise DataError(
                f"{found}: not replaced, since it is no folder with {' and '.join(files)}\n"
                "  fix: move it away, or write to another place"
            )


def current_folder(target: Path) -> Path:
    """``target``, or its old content if a replacement was cut short between its two renames.

    Raises DataError for a path that the system cannot look up.
    """
    with file_errors(target, DataError):
        spare = _spare(_real(target))
        return spare if not target.exists() and spare.is_dir() else target


@contextlib.contextmanager
def file_errors(path: Path, kind: type[BltError]) -> Iterator[None]:
    """Raise ``kind``, naming ``path``, for what goes wrong with files in the block."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise kind(f"{path}: {getattr(error, 'strerror', None) or error}") from error


def _carry(old: Path, fresh: Path, files: Collection[str]) -> None:
    """Copy what a folder holds beside ``files``."""
    for path in old.iterdir() if old.is_dir() else ():
        # NFS names so a removed file that is still open: a copy would stay for ever.
        if path.name in files or path.name.startswith(".nfs"):
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.copytree(path, fresh / path.name, symlinks=True)
        else:
            shutil.copy2(path, fresh / path.name, follow_symlinks=False)


def _swap(fresh: Path, target: Path) -> None:
    spare = _spare(target)
    if target.exists():
        _discard(spare)
        target.rename(spare)
    fresh.rename(target)
    _flush(target.parent)
    _discard(spare)


def _discard(folder: Path) -> None:
    """Remove a folder, if it is there; it loses its name first, so that no half of it is found."""
    if folder.exists():
        shutil.rmtree(folder.rename(_temporary(folder)), ignore_errors=True)


def _real(target: Path) -> Path:
    """The folder that a path leads to, by its own name: links and dots are followed."""
    return Path(os.path.realpath(target))


def _spare(target: Path) -> Path:
    return target.parent / f".{target.name}.old"


def _temporary(target: Path) -> Path:
    return target.parent / f".{target.name}.new-{secrets.token_hex(4)}"


def flush_all(folder: Path) -> None:
    """Flush all that a folder holds, and the folder."""
    for path in (*folder.rglob("*"), folder):
        if not path.is_symlink():
            _flush(path)


def _flush(path: Path) -> None:
    """Have the file system write ``path`` out; without it a power cut may leave empty files."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
