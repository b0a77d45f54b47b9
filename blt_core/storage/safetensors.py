"""Tensors that are read when they are asked for, from safetensors files through memory maps."""

from __future__ import annotations

import ctypes
import mmap
import os
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from blt_core.errors import CheckpointError
from blt_core.files import stand_in_at


class LazyTensors(Mapping[str, Tensor]):
    """Tensors by name, each read when it is asked for; their shapes are known before."""

    @abstractmethod
    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, which is not read."""

    def release(self, name: str) -> None:
        """Say that a tensor was read and is not kept; memory may let go of it."""


class StoredTensors(LazyTensors):
    """The tensors of safetensors files, as views of private memory maps.

    Pages are loaded on demand and copied on write, so the file never changes. Replacing a file on
    disk does not affect tensors already opened. A tensor that is read twice is the same memory.
    Raises CheckpointError for a file that cannot be read, and for a tensor that several files hold.
    """

    def __init__(self, *paths: Path) -> None:
        self._files: dict[str, tuple[Path, Any]] = {}
        for path in paths:
            file = open_file(path)
            for name in file.keys():  # noqa: SIM118 -- it is no mapping
                if name in self._files:
                    raise CheckpointError(f"{path}: {name} is in {self._files[name][0]} too")
                self._files[name] = path, file

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor."""
        return tuple(self._files[name][1].get_slice(name).get_shape())

    def release(self, name: str) -> None:
        """Let memory go of the pages that a tensor alone fills; they are read again if need be.

        safetensors unmaps a file only as a whole. Without this, a model that is cast while it is
        loaded would take the memory of its weights twice.
        """
        tensor = self[name]
        begin, page = tensor.data_ptr(), mmap.PAGESIZE
        first, last = -(-begin // page) * page, (begin + tensor.nbytes) // page * page
        if last > first and hasattr(mmap, "MADV_DONTNEED"):
            madvise = ctypes.CDLL(None).madvise
            madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), mmap.MADV_DONTNEED)

    def __getitem__(self, name: str) -> Tensor:
        path, file = self._files[name]
        try:
            tensor: Tensor = file.get_tensor(name)
        except (SafetensorError, RuntimeError, TypeError, ValueError) as error:
            raise CheckpointError(f"{path}: {name} cannot be read: {error}") from error
        if tuple(tensor.shape) != self.shape(name):  # several numbers in one element
            raise CheckpointError(f"{path}: {name}: dtype {tensor.dtype} is not supported")
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


def open_file(path: Path) -> Any:
    """An open safetensors file, whose header is checked; CheckpointError where that fails."""
    try:
        before = path.stat()
        file = safe_open(str(path), framework="pt")
        # It is opened twice by its name: for the header, and for the map.
        if not os.path.samestat(before, path.stat()):
            raise CheckpointError(f"{path}: replaced while it was read; try again")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: {_reason(path, error)}") from error
    return file


def _reason(path: Path, error: Exception) -> str:
    if isinstance(error, SafetensorError) and (found := stand_in_at(path)):
        return found
    return (
        f"truncated or no safetensors file ({error}); copy or download it again, or train it anew"
    )
