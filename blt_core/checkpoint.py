"""What every checkpoint format shares: names of tensors, strict loading, and safe replacement.

A tensor's name is the dotted config path of its component and the parameter's name within it:
``decoder.layers.0.mlp.down.weight``, ``patcher.byte_scorer.head.weight``.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import attrs
import torch
from torch import Tensor, nn

from blt_core.config import MODEL_KINDS, SCHEMA
from blt_core.errors import CheckpointError
from blt_core.model import Model


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


def load_tensors(modules: nn.ModuleDict, tensors: Mapping[str, Tensor], place: str) -> None:
    """Copy ``tensors`` into the parameters of ``modules``, cast to the dtype these have.

    Nothing is copied unless all fit. Raises CheckpointError that lists every missing, surplus and
    misshapen tensor; ``place`` says where they come from.
    """
    state = modules.state_dict()
    problems = [f"{name}: missing" for name in state if name not in tensors]
    problems += [f"{name}: not a parameter of this model" for name in tensors if name not in state]
    found = {name: tensors[name] for name in state if name in tensors}
    problems += [
        f"{name}: expected {tuple(state[name].shape)}, found {tuple(tensor.shape)}"
        for name, tensor in found.items()
        if tensor.shape != state[name].shape
    ]
    if problems:
        lines = "\n".join(f"  {problem}" for problem in problems)
        raise CheckpointError(f"{place}: the tensors do not fit the model of its config:\n{lines}")
    with torch.no_grad():
        for name, tensor in found.items():
            state[name].copy_(tensor)


@contextlib.contextmanager
def replace_folder(target: Path) -> Iterator[Path]:
    """A temporary sibling folder that takes the place of ``target`` if the block succeeds.

    At every moment the old or the new content is complete on the disk: where the name itself is
    missing for an instant, :func:`current_folder` finds the old content under its spare name.
    """
    fresh = target.with_name(f".{target.name}.new-{secrets.token_hex(4)}")
    fresh.mkdir(parents=True)
    try:
        yield fresh
        # Some writers keep their files to the user alone; the folder's mode is what was asked for.
        mode = fresh.stat().st_mode & 0o666
        for path in fresh.iterdir():
            path.chmod(mode)
            _flush(path)
        _flush(fresh)
        _swap(fresh, target)
    except BaseException:
        shutil.rmtree(fresh, ignore_errors=True)
        raise


def current_folder(target: Path) -> Path:
    """``target``, or its old content if a replacement was cut short between its two renames."""
    spare = _spare(target)
    return spare if not target.exists() and spare.is_dir() else target


def _swap(fresh: Path, target: Path) -> None:
    spare = _spare(target)
    if target.exists():
        shutil.rmtree(spare, ignore_errors=True)
        target.rename(spare)
    fresh.rename(target)
    _flush(target.parent)
    shutil.rmtree(spare, ignore_errors=True)


def _spare(target: Path) -> Path:
    return target.with_name(f".{target.name}.old")


def _flush(path: Path) -> None:
    """Have the file system write ``path`` out; without it a power cut may leave empty files."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
