"""Tensors that are read when they are asked for, from safetensors files through memory maps."""

from __future__ import annotations

import json
import mmap
import os
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from pathlib import Path

import attrs
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from blt_core.errors import CheckpointError


class LazyTensors(Mapping[str, Tensor]):
    """Tensors by name, each read when it is asked for; their shapes are known before."""

    @abstractmethod
    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, which is not read."""

    def release(self, name: str) -> None:
        """Say that a tensor was read and is not kept; memory may let go of it."""


class StoredTensors(LazyTensors):
    """The tensors of safetensors files, as views of private memory maps.

    So memory holds no more than what is used of a tensor that stays as it is stored, and writing to
    it leaves the file alone. The files are those that had their names when this was made, whatever
    replaces them. A tensor that is read twice is the same memory. Raises CheckpointError for a file
    that cannot be read, and for a tensor that several files hold.
    """

    def __init__(self, *paths: Path) -> None:
        self._stored: dict[str, _Stored] = {}
        for path in paths:
            for stored in _stored_in(path):
                if stored.name in self._stored:
                    other = self._stored[stored.name].path
                    raise CheckpointError(f"{path}: {stored.name} is in {other} too")
                self._stored[stored.name] = stored

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor."""
        return self._stored[name].shape

    def release(self, name: str) -> None:
        """Let memory go of the pages that a tensor alone fills; they are read again if need be."""
        self._stored[name].release()

    def __getitem__(self, name: str) -> Tensor:
        return self._stored[name].read()

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def __len__(self) -> int:
        return len(self._stored)


@attrs.frozen
class _Stored:
    """Where a tensor lies: bytes [begin, end) of a mapped file."""

    name: str
    path: Path
    mapped: mmap.mmap
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int

    def read(self) -> Tensor:
        """The tensor, of the map. Raises CheckpointError for a shape that no tensor has."""
        count = (self.end - self.begin) // self.dtype.itemsize
        try:
            if count == 0:
                return torch.empty(self.shape, dtype=self.dtype)
            flat = torch.frombuffer(self.mapped, dtype=self.dtype, offset=self.begin, count=count)
            return flat.view(self.shape)
        except (RuntimeError, TypeError, ValueError) as error:
            raise CheckpointError(f"{self.path}: {self.name} cannot be read: {error}") from error

    def release(self) -> None:
        """Drop the whole pages of the tensor from memory; they come back when they are used."""
        page = mmap.PAGESIZE
        first, last = -(-self.begin // page) * page, self.end // page * page
        if last > first and hasattr(mmap, "MADV_DONTNEED"):
            self.mapped.madvise(mmap.MADV_DONTNEED, first, last - first)


def _stored_in(path: Path) -> Iterator[_Stored]:
    """The tensors of one file."""
    try:
        with path.open("rb") as file:
            with safe_open(str(path), framework="pt"):
                pass  # the whole header is checked
            if not os.path.samestat(os.fstat(file.fileno()), path.stat()):
                raise CheckpointError(f"{path}: replaced while it was read; try again")
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(size))
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path}: truncated or no safetensors file ({error}); "
            "copy or download it again, or train it anew"
        ) from error
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        if entry["dtype"] not in _DTYPES:
            raise CheckpointError(f"{path}: {name}: dtype {entry['dtype']} is not supported")
        begin, end = (8 + size + offset for offset in entry["data_offsets"])
        dtype, shape = _DTYPES[entry["dtype"]], tuple(entry["shape"])
        yield _Stored(name, path, mapped, dtype, shape, begin, end)


#: What safetensors calls dtypes.
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
